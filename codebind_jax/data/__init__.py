"""Sources, transforms, feature cache and input pipeline."""
