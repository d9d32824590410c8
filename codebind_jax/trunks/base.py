"""The interface of a pretrained trunk."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def stack(items: Sequence[np.ndarray]) -> np.ndarray:
  """One batch of equally shaped items, [B, ...]."""
  return np.stack(list(items))


@dataclasses.dataclass(frozen=True, eq=False)
class Trunk:
  """A pretrained network that turns one modality into tokens.

  Attributes:
    name: its name for `load_trunk`.
    modality: "image", "text", ...
    width: C, the width of each token.
    num_tokens: T, tokens per item; token 0 is the class (pooled) token.
    params: pytree of weights.
    apply: pure and jittable `(params, batch) -> float32 [B, T, C]`.
    preprocess: on the host, one raw value -> one array, all of one shape.
    fingerprint: hex SHA-256 of weights, options and the revision of the preprocessing.
    collate: preprocessed items -> batch; may cut padding that no item of the batch needs.
    options: its options as built.
  """

  name: str
  modality: str
  width: int
  num_tokens: int
  params: Any = dataclasses.field(repr=False)
  apply: Callable[[Any, jax.Array | np.ndarray], jax.Array] = dataclasses.field(repr=False)
  preprocess: Callable[[Any], np.ndarray] = dataclasses.field(repr=False)
  fingerprint: str
  collate: Callable[[Sequence[np.ndarray]], np.ndarray] = dataclasses.field(default=stack, repr=False)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def compiled(self) -> Callable[[Any, jax.Array | np.ndarray], jax.Array]:
    """`apply` under jit, compiled once per trunk and batch shape."""
    return jax.jit(self.apply)


def fingerprint(params: Any, options: dict[str, Any], revision: str) -> str:
  """Hex SHA-256 of weights (names, types, shapes, values), options and the revision of the code."""
  digest = hashlib.sha256(json.dumps([revision, options], sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
    digest.update(array.data if array.size else b"")
  return digest.hexdigest()
