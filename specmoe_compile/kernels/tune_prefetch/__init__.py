"""How many records ahead make a decode step fastest, found on the device."""
