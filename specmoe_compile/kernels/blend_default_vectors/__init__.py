"""Weighted sum of default vectors."""
