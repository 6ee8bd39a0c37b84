"""Modules: norms, mixers, dense connections, the stack of layers."""
