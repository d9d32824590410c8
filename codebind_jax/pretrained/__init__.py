"""Frozen trunks from public checkpoints."""
