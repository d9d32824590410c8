"""Evaluators: each yields (name, value)."""
