"""Replays and simulations of recorded routing."""
