"""Per-modality transforms from user files to model inputs."""
