"""Which channels of a trained codebook to keep, without training (TOC), and what that does to a run's numbers.

Command: python -m codebind_jax.tools.toc --workdir=RUN --channels=Q [--ratio=1:0] [--evaluate]
Prints the redundancy of the codes before and after, and with --evaluate the run's validation metrics before and after;
writes RUN/toc.json. The codes are still searched with all channels; the chosen ones of the embedding are kept.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from codebind_jax.api import load
from codebind_jax.methods import toc

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_CHANNELS = flags.DEFINE_integer("channels", 0, "Channels to keep; 0 keeps three quarters.", lower_bound=0)
_RATIO = flags.DEFINE_string("ratio", "1:0", "Parts of best and of worst channels.")
_EVALUATE = flags.DEFINE_bool("evaluate", False, "Evaluate the run on its validation sets before and after.")


def main(_: Sequence[str]) -> None:
  """Selects, prints, writes."""
  if not _WORKDIR.value:
    sys.exit("error: --workdir=RUN is needed")
  try:
    ratio = tuple(int(part) for part in _RATIO.value.split(":"))
    model = load(_WORKDIR.value)
    codes = toc.codes_of(model)
    if len(ratio) != 2:
      raise ValueError(f"--ratio: got {_RATIO.value!r}; allowed: best:worst, such as 1:0 or 3:1")
    found = toc.choose(codes, _CHANNELS.value, ratio)
  except ValueError as error:
    sys.exit(f"error: {error}")
  lines = [f"kept {len(found['channels'])} of {found['of']} channels: {found['channels']}",
           f"mean cosine between codes: {found['redundancy_before']:.4f} -> {found['redundancy_after']:.4f}"]
  if _EVALUATE.value:
    found["metrics"] = toc.evaluate(model, found["channels"], found["of"])
    lines += [f"{name}: {a:.2f} -> {b:.2f}" for name, (a, b) in found["metrics"].items()]
  path = pathlib.Path(_WORKDIR.value) / "toc.json"
  path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  sys.stdout.write("\n".join(lines) + f"\nwritten to {path}\n")


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main)
