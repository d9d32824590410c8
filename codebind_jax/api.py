"""Using a trained model from Python: `load(DIR).embed({"image": [...], "text": [...]})`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Int

from codebind_jax import checkpoint
from codebind_jax.data import transforms
from codebind_jax.evaluators.zeroshot import class_embeddings
from codebind_jax.methods.base import Recipe, make_method
from codebind_jax.pretrained import load_trunk


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Embeddings of N items of one modality (their class token), each part L2-normalised.

  Attributes:
    shared: [N, d_s], comparable with every other modality by cosine.
    specific: [N, d_p], what is unique to the modality; width 0 for text.
    full: [N, d_s + d_p].
    codes_shared: [N, S_s] index of each segment's code in the shared codebook.
    codes_specific: [N, S_p] likewise in the modality's own.
  """

  shared: Float[np.ndarray, "n ds"]
  specific: Float[np.ndarray, "n dp"]
  full: Float[np.ndarray, "n d"]
  codes_shared: Int[np.ndarray, "n ss"]
  codes_specific: Int[np.ndarray, "n sp"]

  @property
  def codes(self) -> Int[np.ndarray, "n s"]:
    """All codes of an item: the shared ones, then the specific ones."""
    return np.concatenate([self.codes_shared, self.codes_specific], axis=1)

  def asdict(self) -> dict[str, np.ndarray]:
    """Columns by name, as the evaluators take them."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Model:
  """A trained model: trunks, heads and codebooks.

  Args:
    config: the training config (plain dict or ConfigDict).
    params: head parameters.
    codebooks: name -> CodebookState.
    trunks: modality -> Trunk, loaded when first needed if not given.
    batch: rows embedded at once; smaller inputs are padded to a power of two.
    modalities: those that have been trained; all of the config's unless given.
  """

  def __init__(
    self, config: Any, params: Any, codebooks: Any, trunks: dict | None = None, batch: int = 256,
    modalities: Sequence[str] | None = None,
  ):
    self.config = config if isinstance(config, ml_collections.ConfigDict) else ml_collections.ConfigDict(config)
    self.params, self.codebooks, self.trunks, self.batch = params, codebooks, dict(trunks or {}), batch
    self.method = make_method(self.config)
    self._embed = _embed_step(self.method)
    self._apply: dict[str, Any] = {}
    self._modalities = tuple(sorted(self.config.model.towers if modalities is None else modalities))

  @property
  def modalities(self) -> tuple[str, ...]:
    """What the model can embed."""
    return self._modalities

  def trunk(self, modality: str) -> Any:
    """The trunk of a modality, fetched and loaded at first use."""
    if modality not in self.trunks:
      tower = self.config.model.towers[modality]
      self.trunks[modality] = load_trunk(tower.trunk, **tower.options.to_dict())
    return self.trunks[modality]

  def embed(self, inputs: Mapping[str, Sequence[Any]]) -> dict[str, Embeddings]:
    """Embeds items of any subset of the modalities.

    Args:
      inputs: modality -> items: paths or arrays (image: uint8 [h, w, 3]), strings for text.

    Returns:
      modality -> Embeddings, rows in the order given.

    Raises:
      ValueError: naming the modality the model lacks and those it has, or the item that cannot be read.
    """
    self._check(inputs)
    return {m: self.embed_tokens(m, self.tokens(m, items)) for m, items in inputs.items()}

  def tokens(self, modality: str, items: Sequence[Any]) -> Float[np.ndarray, "n t c"]:
    """Trunk tokens of raw items, float32 [N, T, C]."""
    trunk = self.trunk(modality)
    apply = self._apply.setdefault(modality, jax.jit(trunk.apply))
    done = []
    for start in range(0, len(items), 32):
      part = []
      for number, item in enumerate(items[start : start + 32], start):
        try:
          part.append(trunk.preprocess(_opened(modality, item)))
        except (ValueError, OSError) as error:
          raise ValueError(f"{modality}[{number}]: {error}") from error
      rows = len(part)
      part += [part[-1]] * (_padded(rows, 32) - rows)
      done.append(np.asarray(apply(trunk.params, trunk.collate(part)))[:rows])
    return np.concatenate(done) if done else np.zeros((0, trunk.num_tokens, trunk.width), np.float32)

  def tokens_seen(self, modality: str) -> int | None:
    """How many of the trunk's tokens decide an embedding: the class token alone, or with a body all (None)."""
    return None if self.config.model.towers[modality].body else 1

  def embed_tokens(self, modality: str, tokens: Float[np.ndarray, "n t c"]) -> Embeddings:
    """Embeds precomputed trunk tokens; only the first `tokens_seen` are looked at."""
    if not len(tokens):
      raise ValueError(f"{modality}: nothing to embed, got 0 items")
    parts = []
    for start in range(0, len(tokens), self.batch):
      chunk = np.asarray(tokens[start : start + self.batch, : self.tokens_seen(modality)], np.float32)
      rows = len(chunk)
      chunk = np.pad(chunk, ((0, _padded(rows, self.batch) - rows), (0, 0), (0, 0)))
      out = self._embed(self.params, self.codebooks, {modality: chunk})[modality]
      columns = (out.shared, out.specific, out.full, out.indices_shared, out.indices_specific)
      parts.append([np.asarray(column)[:rows, 0] for column in columns])
    return Embeddings(*(np.concatenate(columns) for columns in zip(*parts)))

  def classify(
    self, items: Sequence[Any], labels: Sequence[str], *, modality: str = "image", templates: Sequence[str] = ()
  ) -> list[list[tuple[str, float]]]:
    """Zero-shot classification against class names.

    Args:
      items: what to classify.
      labels: class names.
      modality: of the items.
      templates: prompt templates with one `{}`; default the config's.

    Returns:
      Per item (label, cosine), best first.
    """
    self._check({modality: items, "text": labels})
    templates = tuple(templates) or tuple(self.config.data.eval_templates)
    classes = class_embeddings(lambda texts: self.embed({"text": list(texts)})["text"].shared, list(labels), templates)
    scores = self.embed({modality: items})[modality].shared @ classes.T
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[(labels[k], float(scores[row, k])) for k in ranking] for row, ranking in enumerate(order)]

  def _check(self, inputs: Mapping[str, Any]) -> None:
    for name in inputs:
      if name not in self.modalities:
        raise ValueError(f"modality {name!r} is not in this model; it has {list(self.modalities)}")


def _opened(modality: str, item: Any) -> Any:
  """What a path or the bytes of a file hold, by the modality's transform; text and arrays as they are."""
  if modality == "text" or not isinstance(item, str | bytes | pathlib.Path):
    return item
  return transforms.of(modality).read(item)


@functools.lru_cache(maxsize=8)
def _embed_step(method: Recipe) -> Any:
  """The compiled embedding step, shared by all models of one architecture and method."""
  return jax.jit(method.embed_step())


def _padded(rows: int, batch: int) -> int:
  """Smallest power of two that holds `rows`, at most `batch`: few compilations whatever the input sizes."""
  return min(batch, 1 << max(rows - 1, 0).bit_length())


def load(path: str | pathlib.Path) -> Model:
  """Loads a trained model from a run's folder.

  Args:
    path: the workdir of a training run.

  Raises:
    ValueError: if the folder holds no checkpoint.
  """
  folder = pathlib.Path(path).expanduser()
  if not (folder / checkpoint.FOLDER).is_dir():
    raise ValueError(f"{str(path)!r} is not a run's folder: it has no {checkpoint.FOLDER!r} (pass a --workdir of main)")
  store = checkpoint.Checkpoints(folder)
  try:
    meta, arrays = store.read_meta(), store.read_arrays()
    config, position = meta["config"], meta["position"]
  finally:
    store.close()
  config = ml_collections.ConfigDict(config)
  codebooks = make_method(config).restore(arrays["codebooks"])
  return Model(config, arrays["params"], codebooks, modalities=position["held"])
