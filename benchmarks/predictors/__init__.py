"""Predictors of experts on equal terms."""
