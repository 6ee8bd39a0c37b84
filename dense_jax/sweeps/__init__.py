"""Sweeps: many runs of one experiment that are compared in one table."""
