"""What `specmoe bench` and `specmoe doctor` measure with, and the records they write."""
