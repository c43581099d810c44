"""The published comparison on a CPU with the experts on disk."""
