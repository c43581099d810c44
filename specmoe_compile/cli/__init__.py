"""The command line `specmoe`: one file per command, and `measure/` for what they measure with."""
