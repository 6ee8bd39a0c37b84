"""Diagnostics: what layers' hidden states have in common, and what of them is lost with depth."""
