"""The CodeBind model: trunk tokens of every modality through its heads, and the logit scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float

from codebind_jax.models.bodies import make_body
from codebind_jax.models.decoder import Decoder

INITS = {
  "orthogonal": nn.initializers.orthogonal(),
  "lecun": nn.initializers.lecun_normal(),
}


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """One modality's tower after its trunk.

  Attributes:
    shared_dim: width d_s of the shared part; 0 for a head that is specific alone (the release's single head).
    specific_dim: width d_p of the modality-specific part; 0 for none (text).
    hidden: width of a hidden GELU layer in the shared head; 0 is the published linear head.
    dropout: on the normalised trunk tokens, while training.
    init: `orthogonal` keeps the trunk's geometry (its inner products, where the head is not narrower), or `lecun`.
    logit_scale: multiplies the cosine of this modality (ImageBind's per-modality scale), clipped to 100.
    meaning: another modality, in whose trunk's space the last `meaning_dim` columns of this one's tokens lie (the names
      of what a classifier sees, in text space): they go through that modality's shared head and are added to the
      output of this one's, which sees the other columns.
    meaning_dim: how many columns.
    body: name of a module of `models.bodies` that trains between the trunk's tokens and the heads; "" for none.
    body_options: its attributes.
    decoder: `width`, `depth` and `heads` of the decoder that reconstructs the trunk's tokens; empty for none.
  """

  shared_dim: int
  specific_dim: int
  hidden: int = 0
  dropout: float = 0.0
  init: str = "orthogonal"
  logit_scale: float = 1.0
  meaning: str = ""
  meaning_dim: int = 0
  body: str = ""
  body_options: Mapping[str, Any] = FrozenDict()
  decoder: Mapping[str, Any] = FrozenDict()


class Head(nn.Module):
  """LayerNorm and a linear map without bias on all tokens (spec 1.3); optionally one hidden layer."""

  width: int
  hidden: int = 0
  dropout: float = 0.0
  start: str = "orthogonal"

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b n d"]:
    """Maps tokens to `width`; dropout needs an rng named `dropout` when `train`."""
    x = nn.LayerNorm(epsilon=1e-6, name="norm")(tokens)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    if self.hidden:
      x = nn.gelu(nn.Dense(self.hidden, name="hidden")(x))
      x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return nn.Dense(self.width, use_bias=False, kernel_init=INITS[self.start], name="proj")(x)


def whitening(x: Float[np.ndarray, "n c"], power: float, shrink: float = 0.1) -> Float[np.ndarray, "c c"]:
  """Matrix C^-power of the covariance C of rows, its eigenvalues raised by `shrink` of their mean; 1/2 whitens."""
  values, vectors = np.linalg.eigh(np.cov(x.T))
  values = np.maximum(values, 0.0)
  return (vectors * (values + shrink * values.mean()) ** -power) @ vectors.T


def whitened(
  head: Mapping[str, Mapping[str, Array | np.ndarray]], tokens: Float[Array | np.ndarray, "n c"], power: float,
  shrink: float = 0.1,
) -> dict[str, dict[str, Array | np.ndarray]]:
  """Parameters of a linear `Head` that start from the training tokens' statistics.

  Normalised tokens x become (x - mean) C^-power P, with C^-power their `whitening`, P the head's projection, and a
  scale that keeps the size of the output. A frozen encoder crowds its directions (in a text encoder, what all short
  captions share); power 1/2 whitens, smaller ones go part of the way.

  Args:
    head: parameters `norm` and `proj`.
    tokens: of the training items.
    power: 0 only centres.
    shrink: keeps directions that hardly occur from being blown up.
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
  """Shared and specific head of one modality, and its decoder where it has one."""

  spec: TowerSpec

  def setup(self):
    """Makes the heads."""
    spec = self.spec
    options = {"dropout": spec.dropout, "start": spec.init}
    if spec.body:
      self.body = make_body(spec.body, spec.body_options)
    if spec.shared_dim:
      self.shared = Head(spec.shared_dim, spec.hidden, **options)
    if spec.specific_dim:
      self.specific = Head(spec.specific_dim, **options)

  def __call__(
    self, tokens: Float[Array, "b n c"], train: bool = False, added: Float[Array, "b n s"] | None = None
  ) -> Float[Array, "b m d"]:
    """Trunk tokens (or the body's) to [b, m, shared_dim + specific_dim]; `added` is added to the shared part."""
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
    """The trunk's tokens, `width` wide, from the `full` embeddings of all tokens (spec 1.8, the trunk left out)."""
    return Decoder((full.shape[1],), width, (1,), cls_token=False, name="decoder", **self.spec.decoder)(full)


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


def decode(
  model: CodeBind, params: Mapping[str, Any], name: str, full: Float[Array, "b m d"], width: int
) -> Float[Array, "b m c"]:
  """`Tower.decode` of the modality `name`, given the parameters of the whole model."""
  return Tower(model.towers[name]).apply({"params": params[name]}, full, width, method="decode")
