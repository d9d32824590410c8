"""A step compiled for a mesh that need not be here: its memory, its collectives, its floating-point operations."""
