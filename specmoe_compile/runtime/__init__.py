"""runtime of specmoe."""
