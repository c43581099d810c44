"""What benchmarks share: results and their schema, turns, claims, traffic, plots."""
