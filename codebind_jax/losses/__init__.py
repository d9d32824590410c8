"""Losses: pure functions, scalar out, computed in float32."""
