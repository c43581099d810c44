"""The kernels as they are compiled: launches by model, and what each must move."""
