"""Test setup: offline, shapes checked at run time, eight fake CPU devices where a test asks for them in a subprocess."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("codebind_jax", "beartype.beartype")

flags.FLAGS.mark_as_parsed()
