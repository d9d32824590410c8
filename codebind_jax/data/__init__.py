"""Sources, worlds, transforms, and batches of them."""

from codebind_jax.data.opening import open_source as open_source
