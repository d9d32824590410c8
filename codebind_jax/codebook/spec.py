"""The settings of the compositional quantiser."""

import dataclasses
from collections.abc import Mapping

from codebind_jax.codebook.nearest import Distance
from codebind_jax.codebook.revival import Revive
from codebind_jax.codebook.state import ReviveMode

SHARED = "shared"

Layout = str


@dataclasses.dataclass(frozen=True)
class CompositionalSpec:
  """How features are cut and quantised. Hashable, so that it can be a static argument of jit.

  Attributes:
    shared_dim: width of the shared part, the first of the features.
    specific_dim: width of the specific part.
    specific_dims: exceptions to `specific_dim` by modality, a mapping; text has no specific part.
    code_dims: widths (Ds, Dp) of shared and specific codes.
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

  def __post_init__(self):
    for field in ("specific_dims", "num_specific_codes"):
      object.__setattr__(self, field, tuple(sorted(dict(getattr(self, field)).items())))
    for field in ("code_dims", "num_codes", "first"):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    for field, allowed in (
      ("layout", ("parts", "interleaved")),
      ("sharing", ("parts", "one", "separate")),
      ("distance", ("cosine", "l2")),
      ("revive", ("random", "closest", "probrandom", "disturbance", "none")),
      ("revive_mode", ("survive", "codes_only")),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
    if self.sharing == "one" and self.code_dims[0] != self.code_dims[1]:
      raise ValueError(f"sharing='one' needs equal code_dims, got {self.code_dims}")
    if self.shared_dim < 1 or self.shared_dim % self.code_dims[0]:
      raise ValueError(f"shared_dim must be a positive multiple of {self.code_dims[0]}, got {self.shared_dim}")
    for name, width in (("*", self.specific_dim), *self.specific_dims):
      if width < 0 or width % self.code_dims[1]:
        raise ValueError(f"specific_dim of {name!r} must be a multiple of {self.code_dims[1]}, got {width}")
      chunks = self.shared_dim // self.code_dims[0]
      if self.layout == "interleaved" and width not in (0, chunks * self.code_dims[1]):
        raise ValueError(f"layout='interleaved' needs {chunks} specific segments of {name!r}, got width {width}")

  def specific_width(self, modality: str) -> int:
    """Width of a modality's specific part."""
    return dict(self.specific_dims).get(modality, self.specific_dim)

  def codebook_names(self, modality: str) -> tuple[str, str]:
    """Names of the codebooks of a modality's shared and specific part."""
    if self.sharing == "one":
      return SHARED, SHARED
    if self.sharing == "separate":
      return (SHARED, SHARED) if modality in self.first else (modality, modality)
    return SHARED, modality
