"""Costs of compiled programs on a chip: operations, bytes and collectives."""
