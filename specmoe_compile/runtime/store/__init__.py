"""All records of a model, read-only: on disk or in RAM."""
