"""The CodeBind model: trunks, heads over their tokens, decoders, and logit scales, of every modality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Shaped

from codebind_jax.models.decoder import Decoder, decoder_for
from codebind_jax.models.encoder import Encoded, EncoderSpec, mean_clips, normalised
from codebind_jax.models.heads import INITS, Head
from codebind_jax.models.lora import lora
from codebind_jax.norm import unit
from codebind_jax.schema import (
  DERIVED,
  Frozen,
  MaybeName,
  Name,
  Regex,
  Share,
  Side,
  above,
  at_least,
  at_most,
  check_keys,
  to_plain,
  within,
)  # fmt: skip

# Before a modality's name: the trunk's tokens of that modality among a model's features, for its decoder.
TRUNK = "trunk/"

MaybeSide = Annotated[int, at_least(0, "none"), at_most(1 << 16)]
Dropout = Annotated[float, within(0, 1, below=True)]


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """Section `model.decoder`: the decoders, made if a stage has `reconstruction`.

  A decoder reconstructs the input at half its resolution where the trunk is an encoder that runs in the model, else the
  tower's input tokens.

  Attributes:
    width: width of the transformer blocks.
    depth: number of transformer blocks.
    heads: attention heads; must divide the width.
  """

  width: Side = 128
  depth: Annotated[int, above(0), at_most(1000)] = 1
  heads: Side = 4

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
    trunk: name of the trunk, the encoder of the modality's items: a module of `trunks`.
    options: options of the trunk, the arguments of that module's `make_trunk`.
    cache: the trunk is frozen, and its tokens are computed once and kept on disk; if False, it runs in the model, on
      prepared items, and trains as the stages' `tune` says.
    lora_rank: rank of the adapters, where a stage tunes the trunk by LoRA.
    lora_layers: regex, matched in full, of the paths of the linear layers that get adapters.
    augment: random changes of training items, `{"kind": "photo", ...}` of `data.augment`; empty for none. Items of a
      trunk that runs in the model get another one at every draw; of cached ones there are `views`.
    views: cached views of a training item: the clean one and views - 1 augmented ones.
    augmented: probability of drawing an augmented view.
    head: form and start of the shared head: `linear`, LayerNorm and a random linear map, or `published`, those of the
      trunk's checkpoint, whose embedding has `model.shared_dim` values.
    hidden: width of a hidden GELU layer in the shared head; 0 is the published linear head.
    dropout: share of the normalised trunk tokens' values that are set to zero while training.
    init: start of the heads: `orthogonal` keeps the trunk's geometry (its inner products, where the head is not
      narrower), `lecun` draws normal values.
    whiten: the shared head starts with the training tokens' covariance, to this negative power, folded in; 0 for a
      random start.
    starts_from: modality whose heads are copied to this one as its first stage begins; "" for none.
    logit_scale: initial factor of this modality's cosine (ImageBind's per-modality scale), clipped to 100.
    meaning: another modality, in whose trunk's space the last `meaning_dim` columns of this one's tokens lie (a
      classifier's class names in text space): that modality's shared head maps them, and the result is added to the
      output of this one's shared head, which takes the other columns.
    meaning_dim: number of the columns that `meaning` speaks of.
    decoder: of this tower, `model.decoder`; None for none.
  """

  shared_dim: int = dataclasses.field(default=0, metadata=DERIVED)
  specific_dim: MaybeSide = 0
  trunk: MaybeName = ""
  options: Mapping[str, Any] = Frozen()
  cache: bool = True
  lora_rank: Side = 4
  lora_layers: Regex = r".*/(qkv|out|fc1|fc2)"
  augment: Mapping[str, Any] = Frozen()
  views: Annotated[int, at_least(1), at_most(1000)] = 1
  augmented: Share = 0.5
  head: Literal["linear", "published"] = "linear"
  hidden: Annotated[int, at_least(0, "a linear head"), at_most(1 << 20)] = 0
  dropout: Dropout = 0.0
  init: Literal[tuple(INITS)] = "orthogonal"
  whiten: Annotated[float, within(0, 1, "off")] = 0.0
  starts_from: MaybeName = ""
  logit_scale: Annotated[float, above(0), at_most(100)] = 1.0
  meaning: MaybeName = ""
  meaning_dim: MaybeSide = 0
  decoder: DecoderSpec | None = dataclasses.field(default=None, metadata=DERIVED)

  def check(self, path: str) -> None:
    """Refuses keys that exclude each other."""
    if self.whiten and self.hidden:
      raise ValueError(f"config.{path}.whiten: got {self.whiten} with hidden {self.hidden}; allowed: 0, or hidden 0")
    if self.views > 1 and not self.augment:
      raise ValueError(f"config.{path}.augment: is empty with views {self.views}; allowed: {{'kind': ...}}, or views 1")
    if self.cache and self.augment and self.views == 1:
      raise ValueError(f"config.{path}.augment: got {to_plain(self.augment)} for cached tokens with views 1; allowed: "
                       "views above 1, or cache False")  # fmt: skip
    if not self.cache and (self.whiten or self.views > 1):
      raise ValueError(f"config.{path}.cache: got False, which goes with none of whiten and views")
    if self.head == "published" and (self.hidden or self.whiten or self.meaning):
      raise ValueError(f"config.{path}.head: got 'published', which goes with none of hidden, whiten and meaning")
    if self.meaning and not self.meaning_dim:
      raise ValueError(f"config.{path}.meaning_dim: got {self.meaning_dim}; allowed: 1 and up")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Section `model`: the towers and their common settings.

  Attributes:
    towers: modality -> its tower.
    shared_dim: width of the shared part of all modalities.
    quantize: codebooks between heads and losses; if False, losses compare the features without quantisation.
    half: regular expressions of the paths of parameters that are kept in bfloat16 (frozen trunks).
    decoder: decoders of all modalities but text, made if a stage has the loss `reconstruction`.
  """

  towers: Mapping[Name, TowerSpec] = Frozen()
  shared_dim: Side = 384
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


@dataclasses.dataclass(frozen=True)
class TowerTrunk:
  """The trunk of a tower, as far as the tower needs it.

  Attributes:
    module: runs in the model; None where the tower's input is cached tokens.
    head: form of the published head, for towers with `head="published"`.
    lora: whether the module has adapters.
  """

  module: nn.Module | None = None
  head: Head | None = None
  lora: bool = False

  @property
  def spec(self) -> EncoderSpec | None:
    """Shape of an encoder in the model whose input a decoder can reconstruct, else None."""
    spec = getattr(self.module, "spec", None)
    return spec if isinstance(spec, EncoderSpec) and not spec.is_text else None


class Tower(nn.Module):
  """Trunk, shared and specific head of one modality, and its decoder if it has one."""

  spec: TowerSpec
  trunk_of: TowerTrunk = TowerTrunk()

  def setup(self):
    """Creates the trunk and the heads."""
    spec = self.spec
    options = {"dropout": spec.dropout, "start": spec.init}
    if self.trunk_of.module is not None:
      self.trunk = self.trunk_of.module.clone(parent=None)
    if spec.shared_dim:
      form = self.trunk_of.head if spec.head == "published" else None
      if form is None:
        self.shared = Head(spec.shared_dim, spec.hidden, **options)
      else:
        self.shared = form.clone(parent=None, dropout=spec.dropout)
    if spec.specific_dim:
      self.specific = Head(spec.specific_dim, **options)

  def encode(self, x: Shaped[Array, "b ..."], train: bool = False) -> Encoded:
    """The trunk's output for prepared items, with adapters if the trunk has them; cached tokens as they are."""
    if self.trunk_of.module is None:
      return Encoded(x)
    rank = self.spec.lora_rank if self.trunk_of.lora else 0
    with nn.intercept_methods(lora(self.spec.lora_layers, rank)):
      return self.trunk(x, train)

  def __call__(
    self, x: Shaped[Array, "b ..."], train: bool = False, added: Float[Array, "b n s"] | None = None
  ) -> Float[Array, "b m d"]:
    """`output` for prepared items, or tokens [b, n, c] where these are cached."""
    return self.output(self.encode(x, train), x, train, added)[0]

  def output(
    self, encoded: Encoded, x: Shaped[Array, "b ..."], train: bool = False,
    added: Float[Array, "b n s"] | None = None,
  ) -> tuple[Float[Array, "b m d"], Float[Array, "b n c"] | None]:
    """(the heads' output for what `encode` gives, the trunk's tokens averaged over clips where a decoder needs them).

    Clips of a recording are averaged after each one's output is normalised, as in the release.

    Args:
      encoded: of prepared items, or cached tokens.
      x: the items, or the tokens.
      train: turns dropout on.
      added: is added to the shared part.
    """
    tokens, parts = encoded.tokens.astype(jnp.float32), []
    if self.spec.shared_dim:
      shared = self.shared(tokens, train)
      parts.append(shared if added is None else shared + added)
    if self.spec.specific_dim:
      parts.append(self.specific(tokens, train))
    out = jnp.concatenate(parts, axis=-1)
    if encoded.clips > 1:
      out = mean_clips(unit(out), encoded.clips)
    trunk = None
    if self.spec.decoder and self.trunk_of.spec is not None:
      trunk = mean_clips(encoded.trunk, encoded.clips)
    if self.spec.decoder and self.is_initializing():
      self.decode(out, 0 if trunk is not None else x.shape[-1], trunk, encoded.positions)
    return out, trunk

  @nn.compact
  def decode(
    self, full: Float[Array, "b m d"], width: int, trunk: Float[Array, "b m c"] | None = None,
    positions: Float[Array, "m c"] | None = None,
  ) -> Float[Array, "b ..."]:
    """The input decoded from the `full` embeddings of all tokens (spec 1.8).

    Args:
      full: of all tokens.
      width: of the input tokens, where these are what is reconstructed.
      trunk: the trunk's output where the input of its encoder is reconstructed, at half resolution.
      positions: of the trunk's tokens, likewise.
    """
    options = to_plain(self.spec.decoder)
    if trunk is not None:
      return decoder_for(self.trunk_of.spec, name="decoder", **options)(full, trunk, positions)
    return Decoder((full.shape[1],), width, (1,), cls_token=False, name="decoder", **options)(full)


class CodeBind(nn.Module):
  """Towers of all modalities.

  Parameters live under `<modality>/{trunk,shared,specific,decoder}` and `<modality>_log_logit_scale`.

  Attributes:
    towers: by modality.
    trunks: by modality; those not named have cached tokens as their input.
  """

  towers: Mapping[str, TowerSpec]
  trunks: Mapping[str, TowerTrunk] = FrozenDict()

  def trunk_of(self, name: str) -> TowerTrunk:
    """The trunk of a modality's tower."""
    return self.trunks.get(name, TowerTrunk())

  @nn.compact
  def __call__(
    self, inputs: Mapping[str, Shaped[Array, "..."]], train: bool = False, trunks: bool = False, pooled: bool = False
  ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, ""]]]:
    """Runs the towers of the modalities present.

    Args:
      inputs: modality -> trunk tokens [b, n, c], or prepared items where the trunk runs in the model; any subset of
        the towers.
      train: turns dropout on.
      trunks: also give the trunks' tokens that decoders need, under `TRUNK` + modality.
      pooled: only of the pooled token (of every clip).

    Returns:
      (modality -> [b, n, shared_dim + specific_dim], modality -> logit scale).

    Raises:
      ValueError: if a modality has no tower.
    """
    unknown = sorted(set(inputs) - set(self.towers))
    if unknown:
      raise ValueError(f"modality {unknown[0]!r} has no tower; this model has {sorted(self.towers)}")
    modules = {name: Tower(spec, self.trunk_of(name), name=name) for name, spec in self.towers.items()}
    features, scales = {}, {}
    for name in sorted(inputs):
      spec, x, added = self.towers[name], inputs[name], None
      if self.trunk_of(name).module is None:
        x = x.astype(jnp.float32)
      encoded = modules[name].encode(x, train)
      if pooled:
        encoded = dataclasses.replace(encoded, tokens=encoded.tokens[:, :1])
      if spec.meaning:
        tokens, meaning = encoded.tokens[..., : -spec.meaning_dim], encoded.tokens[..., -spec.meaning_dim :]
        encoded, x = dataclasses.replace(encoded, tokens=tokens), tokens
        added = modules[spec.meaning].shared(meaning.astype(jnp.float32), train)
      features[name], trunk = modules[name].output(encoded, x, train, added)
      if trunks and trunk is not None:
        features[TRUNK + name] = trunk
      log_scale = self.param(
        f"{name}_log_logit_scale", lambda _, value=spec.logit_scale: jnp.float32(math.log(value))
      )
      scales[name] = jnp.minimum(jnp.exp(log_scale), 100.0)
    return features, scales


def make_model(
  model: ModelSpec, trunks: Mapping[str, TowerTrunk] | None = None, *, decoded: bool = False
) -> CodeBind:
  """The model of a config.

  Args:
    model: section.
    trunks: of towers whose trunk runs in the model or whose head is published.
    decoded: gives all modalities but text a decoder.
  """
  towers = {
    name: dataclasses.replace(
      tower, shared_dim=model.shared_dim, decoder=model.decoder if decoded and name != "text" else None
    )
    for name, tower in model.towers.items()
  }
  return CodeBind(FrozenDict(towers), FrozenDict(trunks or {}))  # hashable, so that compiled steps can be shared


def decode(
  model: CodeBind, params: Mapping[str, Any], name: str, full: Float[Array, "b m d"], width: int,
  trunk: Float[Array, "b m c"] | None = None,
) -> Float[Array, "b ..."]:
  """`Tower.decode` of the modality `name`, given the parameters of the whole model."""
  positions = None if trunk is None else params[name]["trunk"]["stem"]["positions"]
  tower = Tower(model.towers[name], model.trunk_of(name))
  return tower.apply({"params": params[name]}, full, width, trunk, positions, method="decode")


def target_of(model: CodeBind, name: str, x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
  """What the decoder of the modality `name` is to give back of a tower's input.

  An encoder in the model has its own input, normalised as it takes it. Tokens are standardised, so that a constant has
  the error 1; columns that `meaning` speaks of are left out: they are no features of the item's trunk.
  """
  spec, trunk = model.towers[name], model.trunk_of(name)
  if trunk.spec is not None:
    return normalised(trunk.spec, x)
  tokens = x[..., : x.shape[-1] - spec.meaning_dim] if spec.meaning else x
  return jax.nn.standardize(tokens.astype(jnp.float32), epsilon=1e-6)
