"""Methods: the papers as recipes over shared parts."""
