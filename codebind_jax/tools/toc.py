"""Which channels of a trained codebook to keep, without training (TOC), and what that does to a run's numbers.

Command: python -m codebind_jax.tools.toc --workdir=RUN --channels=Q [--ratio=1:0] [--evaluate]
Prints the redundancy of the codes before and after, and with --evaluate the run's validation metrics before and after;
writes RUN/toc.json. The codes are still searched with all channels; the chosen ones of the embedding are kept.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from jaxtyping import Float, Int

from codebind_jax.api import Embeddings, Model, load
from codebind_jax.methods import toc
from codebind_jax.methods.base import EXTRA

# Every tool has a workdir; one that is imported beside another must not clash with it.
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", allow_override=True)
_CHANNELS = flags.DEFINE_integer("channels", 0, "Channels to keep; 0 keeps three quarters.", lower_bound=0)
_RATIO = flags.DEFINE_string("ratio", "1:0", "Parts of best and of worst channels.")
_EVALUATE = flags.DEFINE_bool("evaluate", False, "Evaluate the run on its validation sets before and after.")


def codes_of(model: Any) -> Float[np.ndarray, "k d"]:
  """The shared codebook of a trained model.

  Raises:
    ValueError: if its method has none.
  """
  if "shared" in model.codebooks:
    return np.asarray(model.codebooks["shared"].codes, np.float32)
  if "codes" in model.params.get(EXTRA, {}):
    return np.asarray(model.params[EXTRA]["codes"], np.float32)
  raise ValueError(f"method {model.config.method!r} has no shared codebook")


def keep_channels(x: Float[np.ndarray, "n d"], channels: Int[np.ndarray, "q"], width: int) -> Float[np.ndarray, "n _"]:
  """The chosen channels of embeddings made of segments of `width`, of every segment the same; normalised again.

  Raises:
    ValueError: if the embeddings are not made of such segments.
  """
  if x.shape[1] % width:
    raise ValueError(f"embeddings of width {x.shape[1]} are not made of codes of width {width}")
  kept = x.reshape(len(x), -1, width)[:, :, channels].reshape(len(x), -1)
  return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


class Sliced(Model):
  """A trained model whose `shared` embeddings have the chosen channels only."""

  def __init__(self, model: Model, channels: Int[np.ndarray, "q"], width: int):
    super().__init__(model.config, model.params, model.codebooks, model.trunks, model.batch, model.modalities)
    self._channels, self._width = channels, width

  def embed_tokens(self, modality: str, tokens: Float[np.ndarray, "n t c"]) -> Embeddings:
    """As `Model`, sliced."""
    whole = super().embed_tokens(modality, tokens)
    return dataclasses.replace(whole, shared=keep_channels(whole.shared, self._channels, self._width))


def select(codes: Float[np.ndarray, "k d"], count: int, ratio: tuple[int, int]) -> dict[str, Any]:
  """Chosen channels, scores, and the mean cosine between codes before and after."""
  channels = np.asarray(toc.select_channels(codes, count or max(1, codes.shape[1] * 3 // 4), ratio))
  return {
    "channels": channels.tolist(), "of": codes.shape[1], "scores": np.asarray(toc.channel_scores(codes)).tolist(),
    "redundancy_before": float(toc.redundancy(codes)), "redundancy_after": float(toc.redundancy(codes[:, channels])),
  }  # fmt: skip


def evaluate(model: Model, channels: Sequence[int], width: int) -> dict[str, tuple[float, float]]:
  """Metric -> (before, after) on the validation sets of the model's own data."""
  from codebind_jax.data.featurize import Featurizer
  from codebind_jax.data.task import open_task
  from codebind_jax.evaluate import Evaluation

  config = model.config.copy_and_resolve_references().unlock()
  config.test = False
  evaluation = Evaluation(config, open_task(config.data), Featurizer(config, model.trunks))
  model.trunks = evaluation.trunks
  before = evaluation.everything(model)
  after = evaluation.everything(Sliced(model, np.asarray(channels), width))
  return {name: (value, after[name]) for name, value in before.items() if name in after and "/train/" not in name}


def main(_: Sequence[str]) -> None:
  """Selects, prints, writes."""
  if not _WORKDIR.value:
    sys.exit("error: --workdir=RUN is needed")
  try:
    ratio = tuple(int(part) for part in _RATIO.value.split(":"))
    model = load(_WORKDIR.value)
    codes = codes_of(model)
    if len(ratio) != 2:
      raise ValueError(f"--ratio: got {_RATIO.value!r}; allowed: best:worst, such as 1:0 or 3:1")
    found = select(codes, _CHANNELS.value, ratio)
  except ValueError as error:
    sys.exit(f"error: {error}")
  lines = [f"kept {len(found['channels'])} of {found['of']} channels: {found['channels']}",
           f"mean cosine between codes: {found['redundancy_before']:.4f} -> {found['redundancy_after']:.4f}"]
  if _EVALUATE.value:
    found["metrics"] = evaluate(model, found["channels"], found["of"])
    lines += [f"{name}: {a:.2f} -> {b:.2f}" for name, (a, b) in found["metrics"].items()]
  path = pathlib.Path(_WORKDIR.value) / "toc.json"
  path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  sys.stdout.write("\n".join(lines) + f"\nwritten to {path}\n")


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main)
