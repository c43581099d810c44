"""Run time of models whose experts are computed on the CPU."""
