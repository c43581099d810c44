"""Names that differ between versions of transformers."""

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the cache of keys and values: since 5.24, and before."""
