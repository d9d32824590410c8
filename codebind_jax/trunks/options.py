"""Types of the trunks' options: what a config may set, beside what each `make_trunk` checks of its options together."""

from __future__ import annotations

from typing import Annotated

from codebind_jax.data.transforms.image import FITS
from codebind_jax.schema import (
  Line,
  MaybeName,
  Name,
  Place,
  Regex,
  Side,
  above,
  at_least,
  at_most,
  one_of,
  within,
)  # fmt: skip

__all__ = [
  "Act", "Azimuth", "Camera", "Count", "Crops", "Dropout", "Dtype", "Fit", "Layers", "Length", "Level", "Line",
  "MaybeName", "MaybeSide", "Name", "Place", "Regex", "Side",
]  # fmt: skip

MaybeSide = Annotated[int, at_least(0), at_most(1 << 16)]
Length = Annotated[int, above(0), at_most(1 << 24)]
Count = Annotated[int, at_least(0), at_most(1000)]
Layers = Annotated[int, above(0), at_most(1000)]
Level = Annotated[int, within(1, 7)]
Dropout = Annotated[float, within(0, 1, below=True)]
Camera = Annotated[float, above(0), at_most(1e6)]
Azimuth = Annotated[int | float, within(-360, 360)]
Crops = Annotated[int, one_of(1, 3)]
Dtype = Annotated[str, one_of("", "float32", "bfloat16", "float16")]
Fit = Annotated[str, one_of(*FITS)]
Act = Annotated[str, one_of("", "gelu", "quick_gelu")]
