"""The language model and the registry of families."""
