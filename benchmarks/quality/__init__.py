"""What coded experts cost in output."""
