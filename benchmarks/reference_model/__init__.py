"""How the reference model that the package carries was trained, measured and described."""
