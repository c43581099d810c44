"""The reference model end to end: tokens, times, start-up."""
