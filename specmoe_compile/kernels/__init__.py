"""kernels of specmoe."""
