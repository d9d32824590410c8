"""The settings of the compositional quantiser, and the section of a config that they are made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal

from codebind_jax.codebook.nearest import DISTANCES, Distance
from codebind_jax.codebook.revival import REVIVALS, Revive
from codebind_jax.codebook.segments import THROUGH
from codebind_jax.codebook.state import REVIVE_MODES, ReviveMode
from codebind_jax.schema import Decay, Frozen, Name, Share, Side, above, at_most

SHARED = "shared"

Layout = str
LAYOUTS = ("parts", "interleaved")
UPDATES = ("snapshot", "sequential")
POSITIONS = ("shared", "own")
ROTATIONS = ("none", "learned")
GRADIENTS = tuple(THROUGH)
STARTS = ("batch", "kmeans", "opq")
Codes = Annotated[int, above(0), at_most(1 << 24)]
MOST_STAGES = 12  # codes of a part that a start by residual quantisation takes minutes for; longer sequences take hours


def stages_within(width: int, size: int, bits: int) -> tuple[int, int]:
  """(parts, stages of each): the most residual codes that so many bytes hold, in the fewest equal parts of a vector.

  Args:
    width: of the vector.
    size: bytes.
    bits: of a code.

  Raises:
    ValueError: if not even one code fits.
  """
  for codes in range(size * 8 // bits, 0, -1):
    for parts in range(1, codes + 1):
      if codes % parts == 0 and width % parts == 0 and codes // parts <= MOST_STAGES:
        return parts, codes // parts
  raise ValueError(f"got {size} bytes for codes of {bits} bits; allowed: {-(-bits // 8)} bytes and more")


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Section `codebook`: the codebooks and how features are quantised.

  Attributes:
    dim: width of a code, which the widths of all shared and specific parts are multiples of.
    dims: modality -> width of the codes in its own codebook, where it is not `dim` (the release has such widths).
    shared_codes: number of codes in the shared codebook.
    codes: modality -> number of codes in its own codebook; needed for each modality with a specific part.
    distance: what makes a code the nearest: the largest cosine, or the smallest squared distance (l2).
    normalize: whether segments are scaled to unit length before they are quantised.
    unit_parts: whether a part is scaled to unit length before it is cut into segments, which then keep their shares of
      it (with `normalize` False).
    positions: shared (one codebook for all segments of a part) or own (one for each segment, as in product
      quantisation; all of them of `shared_codes` or `codes` codes).
    stages: number of codes of a segment, each of which quantises what the ones before it left (residual quantisation);
      more than 1 need `distance` l2.
    beam: sums of codes that the search of several stages keeps from stage to stage; 1 takes each stage's nearest code.
    rotation: learned turns every part before it is cut into segments, and back after them, by an orthogonal matrix that
      is trained with the heads; one for the shared parts of all modalities.
    gradient: how the features get their gradient through the codes: straight_through, or rotation_trick (Fifty et al.,
      2024, arXiv 2410.06424); both is straight_through that trains the codes too, by every term that sees their vectors
      (needs `ema` False).
    start: codes begin as means of k-means over the first batch (batch) or over the items of `start_rows` training rows,
      unaugmented and each distinct one once (kmeans), or as these after a rotation by optimised product quantisation
      (opq; needs `rotation`). Those of several stages are fitted to what `beam` sums leave, up to five of them, as
      `codebook.residual.start_stages` says.
    start_rows: number of training rows for `start` kmeans and opq.
    layout: order of an item's features: parts (shared features first, then specific) or interleaved (chunks of one
      shared and one specific segment).
    update_mode: snapshot quantises all modalities with the codes of the step before; sequential updates the codes after
      each modality, as the release does.
    decay: decay of the moving averages that the codes follow.
    revive: what an unused code moves to, see `codebook.update`.
    revive_mode: whether a revived code's averages move with it (survive) or not (codes_only, as in the release).
    detach_similarity: the similarities to the codes give no gradient to the features, as in the release.
    ema: whether codes follow moving averages of their segments; if False, the optimizer trains them as parameters, by
      the codebook loss that `commitment` then adds, and by the terms on codes.
    first_token: whether the codes' first k-means sees class tokens alone (the release), not all tokens.
    alarm_share: a warning is logged when a codebook's perplexity is under this share of its size.
  """

  dim: Side = 8
  dims: Mapping[Name, Side] = Frozen()
  shared_codes: Codes = 1024
  codes: Mapping[Name, Codes] = Frozen()
  distance: Literal[DISTANCES] = "cosine"
  normalize: bool = True
  unit_parts: bool = False
  positions: Literal[POSITIONS] = "shared"
  stages: Annotated[int, above(0), at_most(256)] = 1
  beam: Annotated[int, above(0), at_most(256)] = 1
  rotation: Literal[ROTATIONS] = "none"
  gradient: Literal[GRADIENTS] = "straight_through"
  start: Literal[STARTS] = "batch"
  start_rows: Annotated[int, above(0), at_most(1 << 24)] = 8192
  layout: Literal[LAYOUTS] = "parts"
  update_mode: Literal[UPDATES] = "snapshot"
  decay: Decay = 0.99
  revive: Literal[REVIVALS] = "random"
  revive_mode: Literal[REVIVE_MODES] = "survive"
  detach_similarity: bool = False
  ema: bool = True
  first_token: bool = False
  alarm_share: Share = 0.1

  def check(self, path: str) -> None:
    """Refuses options that do not go together."""
    if self.start == "opq" and self.rotation == "none":
      raise ValueError(f"config.{path}.start: got 'opq', whose rotation needs config.{path}.rotation; allowed: "
                       "'kmeans', or rotation 'learned'")  # fmt: skip
    if self.stages > 1 and self.distance == "cosine":
      raise ValueError(f"config.{path}.stages: got {self.stages}, but a cosine does not see how long what is left is; "
                       "allowed: 1, or distance 'l2'")  # fmt: skip
    if self.beam > 1 and self.stages == 1:
      raise ValueError(f"config.{path}.beam: got {self.beam} for one stage, whose nearest code is the best; allowed: "
                       "1, or several stages")  # fmt: skip
    if self.gradient == "both" and self.ema:
      raise ValueError(f"config.{path}.gradient: got 'both', but codes that follow averages have no gradient; allowed: "
                       "'straight_through', 'rotation_trick', or ema False")  # fmt: skip

  def spec(self, shared_dim: int, specific_dims: Mapping[str, int]) -> CompositionalSpec:
    """The quantiser of features of these widths.

    Args:
      shared_dim: width of the shared part.
      specific_dims: modality -> width of its specific part.
    """
    return CompositionalSpec(
      shared_dim=shared_dim, specific_dim=0, specific_dims=specific_dims, code_dims=(self.dim, self.dim),
      num_codes=(self.shared_codes, 0), num_specific_codes=self.codes, layout=self.layout, distance=self.distance,
      normalize=self.normalize, decay=self.decay, revive=self.revive, revive_mode=self.revive_mode,
      detach_similarity=self.detach_similarity, ema=self.ema, specific_code_dims=self.dims,
      unit_parts=self.unit_parts, positions=self.positions, stages=self.stages, beam=self.beam,
      gradient=self.gradient,
    )  # fmt: skip

  def width_of(self, name: str) -> int:
    """Width of the codes of a codebook: `shared`, or a modality's own."""
    return self.dims.get(name, self.dim)


@dataclasses.dataclass(frozen=True)
class CompositionalSpec:
  """How features are cut and quantised. Hashable, so that it can be a static argument of jit.

  Attributes:
    shared_dim: width of the shared part, the first of the features.
    specific_dim: width of the specific part.
    specific_dims: exceptions to `specific_dim` by modality, a mapping; text has no specific part.
    code_dims: widths (Ds, Dp) of shared and specific codes.
    specific_code_dims: exceptions to Dp by modality, a mapping.
    num_codes: sizes (Ks, Kp) of the shared codebook and of each specific one.
    num_specific_codes: exceptions to Kp by modality, a mapping.
    layout: "parts" (shared features first, then specific) or "interleaved" (each chunk holds a shared and a specific
      segment).
    sharing: "parts" (one shared codebook, and one for each modality's specific part), "one" (a single codebook for
      everything) or "separate" (each modality but those of `first` has its own codebook for both parts; the release's
      option).
    distance: "cosine" or "l2".
    normalize: L2-normalise segments before quantising.
    beta: weight of the commitment loss.
    ema: codes follow moving averages; False makes them parameters with a codebook loss.
    decay, eps, revive, revive_mode: as in `codebook.update`.
    detach_similarity: similarities give no gradient to the features, as in the release.
    first: modalities that a sequential update takes first.
    unit_parts, positions, stages, beam, gradient: as in `Codebook`.
  """

  shared_dim: int = 1024
  specific_dim: int = 1024
  specific_dims: Mapping[str, int] | tuple[tuple[str, int], ...] = (("text", 0),)
  code_dims: tuple[int, int] = (8, 8)
  num_codes: tuple[int, int] = (1024, 256)
  num_specific_codes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
  layout: Layout = "parts"
  sharing: str = "parts"
  distance: Distance = "cosine"
  normalize: bool = True
  beta: float = 0.25
  ema: bool = True
  decay: float = 0.99
  eps: float = 1e-5
  revive: Revive = "random"
  revive_mode: ReviveMode = "survive"
  detach_similarity: bool = False
  first: tuple[str, ...] = ("text",)
  specific_code_dims: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
  unit_parts: bool = False
  positions: str = "shared"
  stages: int = 1
  beam: int = 1
  gradient: str = "straight_through"

  def __post_init__(self):
    for field in ("specific_dims", "num_specific_codes", "specific_code_dims"):
      object.__setattr__(self, field, tuple(sorted(dict(getattr(self, field)).items())))
    for field in ("code_dims", "num_codes", "first"):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    for field, allowed in (
      ("layout", LAYOUTS),
      ("sharing", ("parts", "one", "separate")),
      ("distance", DISTANCES),
      ("revive", REVIVALS),
      ("revive_mode", REVIVE_MODES),
      ("positions", POSITIONS),
      ("gradient", GRADIENTS),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
    widths = {self.code_dims[1], *dict(self.specific_code_dims).values()}
    if self.sharing != "parts" and (self.specific_code_dims or self.sharing == "one" and widths != {self.code_dims[0]}):
      raise ValueError(f"sharing={self.sharing!r} needs equal code_dims, got {self.code_dims} and "
                       f"{dict(self.specific_code_dims)}")  # fmt: skip
    if self.positions == "own" and self.sharing != "parts":
      raise ValueError(f"positions='own' needs sharing='parts', got {self.sharing!r}")
    if self.stages < 1 or self.stages > 1 and self.distance == "cosine":
      raise ValueError(f"stages must be positive, and 1 for codes by cosine, got {self.stages}")
    if self.beam < 1 or self.beam > 1 and self.stages == 1:
      raise ValueError(f"beam must be positive, and 1 for one stage, got {self.beam}")
    if self.gradient == "both" and self.ema:
      raise ValueError("gradient must not be 'both' for codes that follow averages (ema)")
    if self.shared_dim < 1 or self.shared_dim % self.code_dims[0]:
      raise ValueError(f"shared_dim must be a positive multiple of {self.code_dims[0]}, got {self.shared_dim}")
    for name, width in (("*", self.specific_dim), *self.specific_dims):
      dim = self.specific_code_dim(name)
      if width < 0 or width % dim:
        raise ValueError(f"specific_dim of {name!r} must be a multiple of {dim}, got {width}")
      chunks = self.shared_dim // self.code_dims[0]
      if self.layout == "interleaved" and width not in (0, chunks * dim):
        raise ValueError(f"layout='interleaved' needs {chunks} specific segments of {name!r}, got width {width}")

  def specific_width(self, modality: str) -> int:
    """Width of a modality's specific part."""
    return dict(self.specific_dims).get(modality, self.specific_dim)

  def specific_code_dim(self, modality: str) -> int:
    """Width of the codes of a modality's own codebook."""
    return dict(self.specific_code_dims).get(modality, self.code_dims[1])

  def codebook_names(self, modality: str) -> tuple[str, str]:
    """Names of the codebooks of a modality's shared and specific part."""
    if self.sharing == "one":
      return SHARED, SHARED
    if self.sharing == "separate":
      return (SHARED, SHARED) if modality in self.first else (modality, modality)
    return SHARED, modality

  def lead(self, positions: int) -> tuple[int, ...]:
    """Leading axes of the arrays of a codebook for so many positions: of stages, and of codebooks of their own."""
    return (self.stages,) * (self.stages > 1) + (positions,) * (self.positions == "own")

  def books(self, modality: str) -> dict[str, tuple[int, int, int]]:
    """Codebook name -> (codes, width of a code, positions), of a modality's shared and specific part."""
    shared, specific = self.codebook_names(modality)
    out = {shared: (self.num_codes[0], self.code_dims[0], self.shared_dim // self.code_dims[0])}
    width = self.specific_width(modality)
    if width and specific != SHARED:
      count = dict(self.num_specific_codes).get(modality, self.num_codes[1])
      dim = self.specific_code_dim(modality)
      out[specific] = count, dim, width // dim
    return out

  def bits(self, modality: str, part: str = "shared") -> int:
    """Bits of an item's codes: ceil(log2 K) for every position and stage.

    Args:
      modality: of the item.
      part: "shared", "specific" or "full" (both).
    """
    shared, specific = self.codebook_names(modality)
    sizes = {name: codes for name, (codes, _, _) in self.books(modality).items()}
    widths = (self.shared_dim, self.specific_width(modality))
    dims = (self.code_dims[0], self.specific_code_dim(modality))
    bits = {
      name: math.ceil(math.log2(sizes[book])) * (width // dim) * self.stages if width else 0
      for name, book, width, dim in zip(("shared", "specific"), (shared, specific), widths, dims)
    }
    return sum(bits.values()) if part == "full" else bits[part]

  def item_bytes(self, modality: str, part: str = "shared") -> int:
    """Bytes of an item's packed codes: `bits`, filled up to whole bytes."""
    return -(-self.bits(modality, part) // 8)
