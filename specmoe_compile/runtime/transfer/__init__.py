"""transfer of specmoe."""
