"""LoRA as a pure function of parameters: W + (alpha / rank) A B on the kernels that a path pattern names.

The adapters are a tree of their own that mirrors the parameters, so that the model's code is the same with and without
them: its attention mask stays, and gradients are those of the adapted weights (the CodeBind release gets both wrong,
spec section 7). LoRA: arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_TARGETS = {"all": "(attn|mlp)/[^/]+", "attn": "attn/[^/]+", "attn_out": "attn/out"}
_TUNES = ("head", "lora", "full")


def lora_pattern(modality: str, *, layers: Collection[int] | None = None, targets: str = "all") -> str:
  """Regex of the trunk kernels of one modality, wherever it lies in the tree.

  Args:
    modality: such as "audio".
    layers: block numbers, such as `range(6, 12)` for the last 6 of 12; None for every block.
    targets: "all" (attention and MLP), "attn" or "attn_out" (the attention's output projection).

  Raises:
    ValueError: for unknown `targets` or no layers.
  """
  if targets not in _TARGETS:
    raise ValueError(f"targets: {targets!r}, allowed {sorted(_TARGETS)}")
  if layers is not None and not layers:
    raise ValueError("layers: empty, allowed None or at least one block number")
  numbers = r"\d+" if layers is None else f"({'|'.join(str(i) for i in sorted(layers))})"
  return rf"(.*/)?{re.escape(modality)}/trunk/blocks_{numbers}/{_TARGETS[targets]}/kernel"


def trainable_patterns(tune: str, modality: str, *, logit_scale: bool = False) -> tuple[str, ...]:
  """Regexes (full match) of the parameter paths that one modality trains, wherever it lies in the tree.

  Expected below `<modality>/`: `stem` and `trunk` (encoder), `shared` and `specific` (heads), `decoder`; adapters in a
  tree `lora` that mirrors the rest; the logit scale as `<modality>/log_logit_scale` or `<modality>_log_logit_scale`.

  Args:
    tune: "head" (heads and decoder, trunk frozen), "lora" (these, the adapters and the class token) or "full".
    modality: such as "audio".
    logit_scale: train the logit scale as well ("full" always does).

  Raises:
    ValueError: for an unknown `tune`.
  """
  if tune not in _TUNES:
    raise ValueError(f"tune: {tune!r}, allowed {_TUNES}")
  own = rf"(.*/)?{re.escape(modality)}"
  patterns = (f"{own}[/_]log_logit_scale",) if logit_scale or tune == "full" else ()
  if tune == "full":
    return (*patterns, f"{own}/.*")
  patterns += (f"{own}/(shared|specific|decoder)/.*",)
  if tune == "lora":
    patterns += (rf"(.*/)?lora/{own}/.*", f"{own}/stem/cls_token")
  return patterns


def init_lora(rng: jax.Array, params: Mapping[str, Any], patterns: Sequence[str], *, rank: int = 4) -> dict[str, Any]:
  """Adapters for the kernels that match a pattern; A is uniform in +-1/sqrt(in), B is 0, so nothing changes at first.

  Args:
    rng: key; the draw of a kernel depends on its path only, not on which others are adapted.
    params: parameter tree (arrays or shapes).
    patterns: regexes (full match) over paths of kernels, as from `lora_pattern`.
    rank: r, columns of A and rows of B.

  Returns:
    a tree that mirrors `params` with {"a": [in, r], "b": [r, out]} in place of each adapted kernel [in, out].

  Raises:
    ValueError: if a pattern matches no kernel, or a kernel that is not a matrix, or the rank is out of range.
  """
  kernels = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if path.endswith("/kernel")}
  adapters = {}
  for pattern in patterns:
    matches = [path for path in kernels if re.fullmatch(pattern, path)]
    if not matches:
      raise ValueError(f"lora: pattern {pattern!r} matches no kernel of {sorted(kernels)}")
    for path in matches:
      shape = kernels[path].shape
      if len(shape) != 2 or not 1 <= rank <= min(shape):
        raise ValueError(f"lora: {path} has shape {shape}, allowed a matrix with no side under rank {rank} >= 1")
      key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
      bound = shape[0] ** -0.5
      adapters[f"{path}/a"] = jax.random.uniform(key, (shape[0], rank), minval=-bound, maxval=bound)
      adapters[f"{path}/b"] = jnp.zeros((rank, shape[1]))
  return unflatten_dict(adapters, sep="/")


def apply_lora(
  params: Mapping[str, Any], lora: Mapping[str, Any], *, alpha: float | None = None, precision: Any = None
) -> dict[str, Any]:
  """Parameters with W + (alpha / r) A B in place of every adapted W; differentiable in both trees.

  Args:
    params: parameter tree.
    lora: tree from `init_lora`, or {} for none.
    alpha: scale times rank; None for a scale of 1, as in the release.
    precision: of the product A B; see `jax.lax.Precision`.

  Returns:
    a new tree, which shares the other parameters with `params`. The sum is taken in float32 and cast to W's type.

  Raises:
    ValueError: if an adapter has no kernel in `params`.
  """
  flat, adapters = dict(flatten_dict(params, sep="/")), flatten_dict(lora, sep="/")
  for path, a in adapters.items():
    kernel, _, part = path.rpartition("/")
    if kernel not in flat:
      raise ValueError(f"lora: adapter {path} has no kernel {kernel!r} in params")
    if part == "a":
      b, scale = adapters[f"{kernel}/b"], 1.0 if alpha is None else alpha / a.shape[1]
      delta = scale * jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=precision)
      flat[kernel] = (flat[kernel] + delta).astype(flat[kernel].dtype)
  return unflatten_dict(flat, sep="/")


def merge(params: Mapping[str, Any], *, alpha: float | None = None) -> dict[str, Any]:
  """Folds the adapters under `params["lora"]` into the other parameters, for export; the outputs stay the same.

  Raises:
    ValueError: if there is no `lora` in `params`.
  """
  if "lora" not in params:
    raise ValueError(f"params: no 'lora' to merge, keys {sorted(params)}")
  base = {key: value for key, value in params.items() if key != "lora"}
  return apply_lora(base, params["lora"], alpha=alpha, precision=jax.lax.Precision.HIGHEST)


def load_lora(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Adapters of one trunk from the CodeBind release's names: `[lora_model.]blocks.1.attn.in_proj_lora_down`, ...

  The release's `down` [r, in] is A transposed and its `up` [out, r] is B transposed; its scale is 1.

  Returns:
    a tree for `apply_lora` on the parameters of a trunk ({"blocks_1": ...}).

  Raises:
    ValueError: naming the entries whose name is not of this form.
  """
  names = {"attn.in_proj": "attn/qkv", "attn.out_proj": "attn/out", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
  adapters, unexpected = {}, []
  for name, value in state_dict.items():
    match = re.fullmatch(rf"(?:lora_model\.)?blocks\.(\d+)\.({'|'.join(names)})_lora_(down|up)", name)
    if not match:
      unexpected.append(name)
      continue
    part = {"down": "a", "up": "b"}[match[3]]
    adapters[f"blocks_{match[1]}/{names[match[2]]}/kernel/{part}"] = jnp.asarray(np.asarray(value).T)
  if unexpected:
    raise ValueError(f"lora state_dict: unexpected {unexpected}")
  return unflatten_dict(adapters, sep="/")
