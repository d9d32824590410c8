"""Fetches and builds packaged data: `python -m codebind_jax.tools.prepare icons [--profile=small] [--data_dir=DIR]`.

`all` stands for every packaged world.
"""

import sys

from absl import app, flags, logging

from codebind_jax.data.worlds.registry import PACKAGED, ensure
from codebind_jax.runtime import signals

_PROFILE = flags.DEFINE_string("profile", "auto", "auto, or a profile of the world: tiny, tiny-plus, small, full.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data folder; default $CODEBIND_DATA, else the user's cache folder.")


def main(argv: list[str]) -> None:
  """Builds the worlds named on the command line."""
  if len(argv) < 2:
    raise app.UsageError(f"name at least one world, or all: {', '.join(PACKAGED)}")
  for world in PACKAGED if argv[1:] == ["all"] else argv[1:]:
    try:
      folder = ensure(world, _PROFILE.value, _DATA_DIR.value, again=True)
    except (ValueError, OSError, RuntimeError) as error:
      logging.error("%s", error)
      sys.exit(1)
    logging.info("%s is ready: %s", world, folder)


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  signals.command(app.run, main)
