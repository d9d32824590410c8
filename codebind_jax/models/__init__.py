"""Flax modules: towers, heads, decoders."""
