"""Launches by kernel; each module is named after the folder of `specmoe_compile.kernels`."""
