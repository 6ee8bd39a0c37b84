"""Prefill, decoding and sampling."""
