"""The largest scores of each row, in one launch."""
