"""The page that a run ends with: what was measured, as tables and pictures."""
