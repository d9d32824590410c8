"""Selects channels of a trained codebook without training (TOC), and evaluates a run with them.

Command: python -m codebind_jax.tools.toc --workdir=RUN --channels=Q [--ratio=1:0] [--evaluate]
Prints the redundancy of the codes before and after, and with --evaluate the run's validation metrics before and after;
writes RUN/toc.json. Codes are still searched with all channels; the embedding keeps the chosen ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from codebind_jax import files
from codebind_jax.api import load
from codebind_jax.compare import channels
from codebind_jax.methods import toc
from codebind_jax.runtime import signals


def main(_: Sequence[str]) -> None:
  """Selects the channels, prints and writes the results."""
  if not flags.FLAGS.workdir:
    sys.exit("error: --workdir=RUN is needed")
  try:
    ratio = tuple(int(part) for part in flags.FLAGS.ratio.split(":"))
    model = load(flags.FLAGS.workdir)
    codes = toc.codes_of(model)
    if len(ratio) != 2:
      raise ValueError(f"--ratio: got {flags.FLAGS.ratio!r}; allowed: best:worst, such as 1:0 or 3:1")
    if flags.FLAGS.channels > codes.shape[1]:
      raise ValueError(f"--channels: got {flags.FLAGS.channels}; allowed: 0 to {codes.shape[1]}")
    choice = toc.choose(codes, flags.FLAGS.channels, ratio)
  except ValueError as error:
    sys.exit(f"error: {error}")
  lines = [f"kept {len(choice['channels'])} of {choice['of']} channels: {choice['channels']}",
           f"mean cosine between codes: {choice['redundancy_before']:.4f} -> {choice['redundancy_after']:.4f}"]
  if flags.FLAGS.evaluate:
    choice["metrics"] = channels.evaluate(model, choice["channels"], choice["of"])
    lines += [f"{name}: {a:.2f} -> {b:.2f}" for name, (a, b) in choice["metrics"].items()]
  path = files.path(flags.FLAGS.workdir) / "toc.json"
  files.write_whole(path, json.dumps(choice, indent=1) + "\n")
  sys.stdout.write("\n".join(lines) + f"\nwritten to {path}\n")


if __name__ == "__main__":  # flags of its own: importing it defines none
  flags.DEFINE_string("workdir", None, "Folder of a finished run.")
  flags.DEFINE_integer("channels", 0, "Channels to keep; 0 keeps three quarters.", lower_bound=0)
  flags.DEFINE_string("ratio", "1:0", "Parts of best and of worst channels.")
  flags.DEFINE_bool("evaluate", False, "Evaluate the run on its validation sets before and after.")
  logging.set_verbosity(logging.WARNING)
  signals.command(app.run, main)
