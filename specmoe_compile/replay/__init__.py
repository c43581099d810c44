"""Routing traces, and their replay through the runtime with other caches, links and predictors."""
