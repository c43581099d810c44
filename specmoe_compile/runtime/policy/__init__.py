"""What a missing expert gets, and how much may be guessed."""
