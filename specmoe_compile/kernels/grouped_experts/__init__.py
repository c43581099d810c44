"""Experts of many tokens (prefill), grouped by slot."""
