"""Counting the experts of a prompt's last tokens, in one launch."""
