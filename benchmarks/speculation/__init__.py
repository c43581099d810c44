"""What speculation and its self-tuning are worth."""
