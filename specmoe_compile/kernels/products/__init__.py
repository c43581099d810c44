"""One token times several weights, in one launch."""
