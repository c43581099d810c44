"""Decode on a GPU at full model size."""
