"""Looking up a step's experts in the cache tables, and giving slots to those that are missing."""
