"""Which expert lies in which slot, and counts of what was found there."""
