"""passes of specmoe."""
