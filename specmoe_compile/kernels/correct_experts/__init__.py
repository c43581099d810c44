"""Completing a layer: late experts, default vectors of skipped ones, and the sum over K."""
