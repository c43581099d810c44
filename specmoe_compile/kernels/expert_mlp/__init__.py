"""Experts of a few tokens (decode), computed in place from the slots of the expert cache."""
