"""Copying expert records from host memory into cache slots, by a list on the device."""
