"""What encoders want of items, made on the host from decoded values: picklable, without JAX, for worker processes."""
