"""The CodeBind model: heads over the trunk tokens of every modality, and logit scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float

from codebind_jax.models.bodies import BODIES, body_class
from codebind_jax.models.decoder import Decoder
from codebind_jax.models.heads import INITS, Head
from codebind_jax.schema import DERIVED, Frozen, Regex, above, at_least, check_keys, to_plain, within

@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """Section `model.decoder`: the decoders that reconstruct the trunks' tokens, made if a stage has `reconstruction`.

  Attributes:
    width: of the blocks.
    depth: number of blocks.
    heads: attention heads; must divide the width.
  """

  width: Annotated[int, above(0)] = 128
  depth: Annotated[int, above(0)] = 1
  heads: Annotated[int, above(0)] = 4

  def check(self, path: str) -> None:
    """Refuses heads that do not divide the width."""
    if self.width % self.heads:
      raise ValueError(f"config.{path}: got {to_plain(self)}; allowed: heads that divide the width")


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """Section `model.towers.MODALITY`: one modality's trunk, and its tower after it.

  Attributes:
    shared_dim: width d_s of the shared part, `model.shared_dim`; 0 for a head that is specific alone (the release's
      single head).
    specific_dim: width d_p of the modality-specific part; 0 for none (text).
    trunk: name of a module of `trunks` that turns the modality's items into tokens.
    options: arguments of that module's `make_trunk`.
    views: cached views of a training item: the clean one and views - 1 augmented ones.
    augmented: probability of drawing an augmented view.
    body: name of a trained module of `models.bodies` between the trunk's tokens and the heads; "" for none.
    body_options: attributes of the body.
    hidden: width of a hidden GELU layer in the shared head; 0 is the published linear head.
    dropout: on the normalised trunk tokens, while training.
    init: `orthogonal` keeps the trunk's geometry (its inner products, where the head is not narrower), or `lecun`.
    whiten: the shared head starts with the training tokens' covariance, to this negative power, folded in; 0 for a
      random start.
    starts_from: modality whose heads are copied to this one as its first stage begins; "" for none.
    logit_scale: initial factor of this modality's cosine (ImageBind's per-modality scale), clipped to 100.
    meaning: another modality, in whose trunk's space the last `meaning_dim` columns of this one's tokens lie (a
      classifier's class names in text space): that modality's shared head maps them, and the result is added to the
      output of this one's shared head, which takes the other columns.
    meaning_dim: number of these columns.
    decoder: of this tower, `model.decoder`; None for none.
  """

  shared_dim: int = dataclasses.field(default=0, metadata=DERIVED)
  specific_dim: Annotated[int, at_least(0, "none")] = 0
  trunk: str = ""
  options: Mapping[str, Any] = Frozen()
  views: Annotated[int, at_least(1)] = 1
  augmented: Annotated[float, within(0, 1)] = 0.5
  body: str = ""
  body_options: Mapping[str, Any] = Frozen()
  hidden: Annotated[int, at_least(0, "a linear head")] = 0
  dropout: Annotated[float, within(0, 1, below=True)] = 0.0
  init: Literal[tuple(INITS)] = "orthogonal"
  whiten: Annotated[float, within(0, 1, "off")] = 0.0
  starts_from: str = ""
  logit_scale: Annotated[float, above(0)] = 1.0
  meaning: str = ""
  meaning_dim: Annotated[int, at_least(0, "none")] = 0
  decoder: DecoderSpec | None = dataclasses.field(default=None, metadata=DERIVED)

  def check(self, path: str) -> None:
    """Refuses keys that exclude each other."""
    if self.whiten and self.hidden:
      raise ValueError(f"config.{path}.whiten: got {self.whiten} with hidden {self.hidden}; allowed: 0, or hidden 0")
    if self.body:
      check_keys([self.body], sorted(BODIES), f"{path}.body")
      if self.meaning or self.whiten:
        raise ValueError(f"config.{path}.body: {self.body!r} goes with neither meaning nor whiten")
    if self.meaning and not self.meaning_dim:
      raise ValueError(f"config.{path}.meaning_dim: got {self.meaning_dim}; allowed: 1 and up")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Section `model`: the towers and their common settings.

  Attributes:
    towers: by modality.
    shared_dim: width of the shared part of all modalities.
    quantize: codebooks between heads and losses; if False, losses compare the features without quantisation.
    half: path regexes of parameters kept in bfloat16 (frozen trunks).
    decoder: of all modalities but text, if a stage has the loss `reconstruction`.
  """

  towers: Mapping[str, TowerSpec] = Frozen()
  shared_dim: Annotated[int, above(0)] = 384
  quantize: bool = True
  half: tuple[Regex, ...] = ()
  decoder: DecoderSpec = DecoderSpec()

  def check(self, path: str) -> None:
    """Refuses towers that name an unknown modality, or their own."""
    for name, tower in self.towers.items():
      for key, other in (("starts_from", tower.starts_from), ("meaning", tower.meaning)):
        if other:
          check_keys([other], [m for m in self.towers if m != name], f"{path}.towers.{name}.{key}")

  @property
  def specific_dims(self) -> dict[str, int]:
    """Modality -> width of its specific part."""
    return {name: tower.specific_dim for name, tower in self.towers.items()}


def whitening(x: Float[np.ndarray, "n c"], power: float, shrink: float = 0.1) -> Float[np.ndarray, "c c"]:
  """C^-power of the rows' covariance C, whose eigenvalues are raised by `shrink` of their mean; power 1/2 whitens."""
  values, vectors = np.linalg.eigh(np.cov(x.T))
  values = np.maximum(values, 0.0)
  return (vectors * (values + shrink * values.mean()) ** -power) @ vectors.T


def whitened(
  head: Mapping[str, Mapping[str, Array | np.ndarray]], tokens: Float[Array | np.ndarray, "n c"], power: float,
  shrink: float = 0.1,
) -> dict[str, dict[str, Array | np.ndarray]]:
  """Parameters of a linear `Head` with the whitening of the training tokens folded in.

  Normalised tokens x become (x - mean) C^-power P, with C^-power their `whitening`, P the head's projection, and a
  scale that keeps the size of the output. A frozen encoder's embeddings share dominant directions (in a text encoder,
  those common to all short captions); power 1/2 whitens them, smaller powers do so in part.

  Args:
    head: parameters `norm` and `proj`.
    tokens: of the training items.
    power: 0 only centres.
    shrink: keeps rare directions from being amplified.
  """
  x = np.asarray(tokens, np.float64)
  x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
  mean, kernel = x.mean(0), np.asarray(head["proj"]["kernel"], np.float64)
  new = whitening(x, power, shrink) @ kernel
  new *= np.sqrt(np.mean(((x - mean) @ kernel) ** 2) / np.mean(((x - mean) @ new) ** 2))
  return {
    "norm": {"scale": head["norm"]["scale"], "bias": jnp.asarray(-mean, jnp.float32)},
    "proj": {"kernel": jnp.asarray(new, jnp.float32)},
  }


class Tower(nn.Module):
  """Shared and specific head of one modality, and its body and decoder if it has them."""

  spec: TowerSpec

  def setup(self):
    """Creates the body and the heads."""
    spec = self.spec
    options = {"dropout": spec.dropout, "start": spec.init}
    if spec.body:
      self.body = body_class(spec.body)(**spec.body_options)
    if spec.shared_dim:
      self.shared = Head(spec.shared_dim, spec.hidden, **options)
    if spec.specific_dim:
      self.specific = Head(spec.specific_dim, **options)

  def __call__(
    self, tokens: Float[Array, "b n c"], train: bool = False, added: Float[Array, "b n s"] | None = None
  ) -> Float[Array, "b m d"]:
    """The heads' output for trunk tokens, [b, m, shared_dim + specific_dim]; `added` is added to the shared part."""
    parts, width = [], tokens.shape[-1]
    if self.spec.body:
      tokens = self.body(tokens, train)
    if self.spec.shared_dim:
      shared = self.shared(tokens, train)
      parts.append(shared if added is None else shared + added)
    if self.spec.specific_dim:
      parts.append(self.specific(tokens, train))
    out = jnp.concatenate(parts, axis=-1)
    if self.spec.decoder and self.is_initializing():
      self.decode(out, width)
    return out

  @nn.compact
  def decode(self, full: Float[Array, "b m d"], width: int) -> Float[Array, "b m c"]:
    """The trunk's tokens, `width` wide, decoded from the `full` embeddings of all tokens (spec 1.8 without trunk)."""
    options = to_plain(self.spec.decoder)
    return Decoder((full.shape[1],), width, (1,), cls_token=False, name="decoder", **options)(full)


class CodeBind(nn.Module):
  """Towers of all modalities.

  Parameters live under `<modality>/{body,shared,specific,decoder}` and `<modality>_log_logit_scale`.
  """

  towers: Mapping[str, TowerSpec]

  @nn.compact
  def __call__(
    self, tokens: Mapping[str, Float[Array, "..."]], train: bool = False
  ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, ""]]]:
    """Runs the towers of the modalities present.

    Args:
      tokens: modality -> trunk tokens [b, n, c]; any subset of the towers.
      train: turns dropout on.

    Returns:
      (modality -> [b, n, shared_dim + specific_dim], modality -> logit scale).

    Raises:
      ValueError: if a modality has no tower.
    """
    unknown = sorted(set(tokens) - set(self.towers))
    if unknown:
      raise ValueError(f"modality {unknown[0]!r} has no tower; this model has {sorted(self.towers)}")
    modules = {name: Tower(spec, name=name) for name, spec in self.towers.items()}
    features, scales = {}, {}
    for name in sorted(tokens):
      spec, x, added = self.towers[name], tokens[name].astype(jnp.float32), None
      if spec.meaning:
        x, meaning = x[..., : -spec.meaning_dim], x[..., -spec.meaning_dim :]
        added = modules[spec.meaning].shared(meaning, train)
      features[name] = modules[name](x, train, added)
      log_scale = self.param(
        f"{name}_log_logit_scale", lambda _, value=spec.logit_scale: jnp.float32(math.log(value))
      )
      scales[name] = jnp.minimum(jnp.exp(log_scale), 100.0)
    return features, scales


def make_model(model: ModelSpec, *, decoded: bool = False) -> CodeBind:
  """The model of a config; `decoded` gives all modalities but text a decoder."""
  towers = {
    name: dataclasses.replace(
      tower, shared_dim=model.shared_dim, decoder=model.decoder if decoded and name != "text" else None
    )
    for name, tower in model.towers.items()
  }
  return CodeBind(FrozenDict(towers))  # hashable, so that compiled steps can be shared


def decode(
  model: CodeBind, params: Mapping[str, Any], name: str, full: Float[Array, "b m d"], width: int
) -> Float[Array, "b m c"]:
  """`Tower.decode` of the modality `name`, given the parameters of the whole model."""
  return Tower(model.towers[name]).apply({"params": params[name]}, full, width, method="decode")
