"""The interface of a trunk: an encoder of one modality, with or without a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from codebind_jax.data import transforms
from codebind_jax.data.inputs import Input
from codebind_jax.models.encoder import Encoded, mean_clips
from codebind_jax.models.heads import Head
from codebind_jax.norm import unit


@dataclasses.dataclass(frozen=True)
class PublishedHead:
  """The checkpoint's own map from the trunk's tokens to its embedding.

  Attributes:
    module: its form; parameters {"norm": {scale, bias}, "proj": {kernel, bias}}, as far as the form has them.
    load: shapes of these parameters -> the checkpoint's values; None for a head without parameters.
    logit_scale: the checkpoint's factor on the cosine (not its logarithm), as far as this modality has one.
    logit_bias: what is added after that (SigLIP, whose logits go into a sigmoid).
  """

  module: Head
  load: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)
  logit_scale: float = 1.0
  logit_bias: float = 0.0


def drawn(module: nn.Module, item: Input, rng: jax.Array | None = None) -> Any:
  """Parameters of a module that takes such items, drawn with `rng`, or key 0; under `jax.eval_shape` their shapes."""
  example = jnp.zeros((1, *item.shape), item.dtype)
  return module.init(jax.random.key(0) if rng is None else rng, example).get("params", {})


@dataclasses.dataclass(frozen=True, eq=False)
class Trunk:
  """An encoder of one modality.

  Attributes:
    name: its name for `load_trunk`.
    modality: "image", "text", ...
    module: a flax module, prepared batch -> `models.encoder.Encoded`, whose token 0 is the pooled one. Its call takes
      `train` as well.
    input: what the module wants of an item.
    load: shapes of the module's parameters (`jax.ShapeDtypeStruct`, with or without a sharding) -> parameters with the
      checkpoint's values, placed accordingly; None for a module without a checkpoint, whose parameters are drawn.
    fingerprint: hex SHA-256 of weights, options and the revision of the preparation.
    options: its options as built.
    head: of the checkpoint, if it has one.
    licence: of the checkpoint.
  """

  name: str
  modality: str
  module: nn.Module = dataclasses.field(repr=False)
  input: Input
  fingerprint: str
  load: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  head: PublishedHead | None = None
  licence: str = ""

  def init(self, rng: jax.Array) -> Any:
    """Parameters of the module, drawn; under `jax.eval_shape` their shapes."""
    return drawn(self.module, self.input, rng)

  @functools.cached_property
  def shapes(self) -> Any:
    """Shapes and types of the module's parameters."""
    return jax.eval_shape(self.init, jax.random.key(0))

  @functools.cached_property
  def params(self) -> Any:
    """The module's parameters: those of the checkpoint, read at first use, or drawn with key 0."""
    with jax.ensure_compile_time_eval():  # values, also where a function that is being traced asks for them first
      return self.load(self.shapes) if self.load else jax.jit(self.init)(jax.random.key(0))

  def apply(self, params: Any, batch: jax.Array | np.ndarray) -> jax.Array:
    """Tokens [b, n, c] of a prepared batch; pure and jittable."""
    return self.module.apply({"params": params}, jnp.asarray(batch)).tokens

  @functools.cached_property
  def compiled(self) -> Callable[[Any, jax.Array | np.ndarray], jax.Array]:
    """`apply` under jit, compiled once per trunk and batch shape."""
    return jax.jit(self.apply)

  @functools.cached_property
  def encoded(self) -> Encoded:
    """Shapes of what the module gives for one item."""
    item = jax.ShapeDtypeStruct((1, *self.input.shape), self.input.dtype)
    return jax.eval_shape(lambda p, x: self.module.apply({"params": p}, x), self.shapes, item)

  @functools.cached_property
  def head_params(self) -> Any:
    """Parameters of the published head, read at first use; {} for one without any."""
    token = jax.ShapeDtypeStruct((1, 1, self.width), np.float32)
    shapes = jax.eval_shape(self.head.module.init, jax.random.key(0), token).get("params", {})
    with jax.ensure_compile_time_eval():
      return self.head.load(shapes) if self.head.load else shapes

  def embed(self, batch: jax.Array | np.ndarray) -> jax.Array:
    """The checkpoint's own embeddings of a prepared batch, [b, d], unit length; clips are averaged after that."""

    def run(params: Any, head: Any, batch: jax.Array) -> jax.Array:
      out = self.module.apply({"params": params}, batch)
      embedding = self.head.module.apply({"params": head}, out.tokens[:, :1].astype(jnp.float32))[:, 0]
      return mean_clips(unit(embedding), out.clips)

    return jax.jit(run)(self.params, self.head_params, batch)

  @property
  def num_tokens(self) -> int:
    """T, tokens per item (and clip); token 0 is the pooled one."""
    return self.encoded.tokens.shape[1]

  @property
  def width(self) -> int:
    """C, the width of each token."""
    return self.encoded.tokens.shape[2]

  @property
  def preprocess(self) -> Callable[[Any], np.ndarray]:
    """`input.prepare`."""
    return self.input.prepare

  @property
  def collate(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """`input.collate`."""
    return self.input.collate

  def read(self, value: Any) -> Any:
    """The decoded value of a path, bytes or array; text as it is."""
    if self.input.read:
      return self.input.read(value)
    return value if self.modality == "text" else transforms.of(self.modality).read(value)


def fingerprint(params: Any, options: Mapping[str, Any], revision: str) -> str:
  """Hex SHA-256 of weights (names, types, shapes, values), options and the revision of the code."""
  digest = hashlib.sha256(json.dumps([revision, dict(options)], sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
    digest.update(array.data if array.size else b"")
  return digest.hexdigest()
