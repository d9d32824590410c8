"""The settings of the publication, a config a stage."""
