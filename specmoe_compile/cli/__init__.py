"""cli of specmoe."""
