"""Measurements of specmoe: reference model, arms, shapes and records."""
