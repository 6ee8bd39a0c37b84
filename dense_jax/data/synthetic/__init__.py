"""Synthetic tasks as sources of rows, which are made when they are needed."""
