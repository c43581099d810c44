"""Learning default vectors, probing layers, and what a policy costs in output."""
