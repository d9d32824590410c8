"""Rotary positions of an image's patches, by the name that `EncoderSpec.rope` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codebind_jax.models.transformer import Rope

# Name -> function (spec, input size without channels) -> Rope over all tokens; those before the patches are not turned.
TABLES: dict[str, Callable[[Any, tuple[int, ...]], Rope]] = {}
