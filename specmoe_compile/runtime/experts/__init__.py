"""What an expert is: its tensors, their place in a record, what is computed with them."""
