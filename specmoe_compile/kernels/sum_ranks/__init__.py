"""The sum of a small tensor over ranks, in one launch that writes into the others' memory."""
