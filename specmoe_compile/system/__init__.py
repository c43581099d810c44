"""The machine: aligned memory, sizes, NUMA nodes, NVTX ranges, progress."""
