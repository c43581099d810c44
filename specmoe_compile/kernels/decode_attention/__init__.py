"""Attention of a decode step that reads the filled part of a static cache only."""
