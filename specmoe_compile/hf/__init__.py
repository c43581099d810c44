"""Hugging Face: checkpoints, conversion, loading, and the tie between a session and a model."""
