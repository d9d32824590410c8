"""LoRA on the linear layers of any flax module, by an interceptor (arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def lora(pattern: str, rank: int) -> Any:
  """An interceptor for `nn.intercept_methods`: y = x W + b + (x A) B on the linear layers that `pattern` names.

  x A is computed first, so that a frozen W needs no gradient of its size. A is uniform in +-1/sqrt(in), B starts at 0,
  so that nothing changes at first. The parameters stand beside the kernel, as `lora_a` [in, rank] and `lora_b`
  [rank, out].

  Args:
    pattern: regex, matched in full, of a layer's path, such as ".*/attn/(qkv|out)".
    rank: r; 0 for none.
  """

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if not (rank and context.method_name == "__call__" and isinstance(layer, nn.Dense)):
      return call(*args, **kwargs)
    if not re.fullmatch(pattern, "/".join(layer.path)):
      return call(*args, **kwargs)
    x = args[0] if layer.dtype is None else args[0].astype(layer.dtype)
    bound = x.shape[-1] ** -0.5
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    a = layer.param("lora_a", draw, (x.shape[-1], rank)).astype(x.dtype)
    b = layer.param("lora_b", nn.initializers.zeros, (rank, layer.features)).astype(x.dtype)
    return call(*args, **kwargs) + (x @ a) @ b

  return intercept


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters with every adapter folded into its kernel, W + A B in float32, in W's type; outputs stay the same.

  Adapters of scanned layers are stacked [depth, ...], as their kernels are.
  """
  flat = dict(flatten_dict(params))
  for path in [path for path in flat if path[-1] == "lora_a"]:
    a, b = (jnp.asarray(flat.pop((*path[:-1], name)), jnp.float32) for name in ("lora_a", "lora_b"))
    kernel = flat[(*path[:-1], "kernel")]
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    flat[(*path[:-1], "kernel")] = (jnp.asarray(kernel, jnp.float32) + delta).astype(kernel.dtype)
  return unflatten_dict(flat)


def from_release(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Adapters of one trunk from the CodeBind release's names: `[lora_model.]blocks.1.attn.in_proj_lora_down`, ...

  The release's `down` [r, in] is A transposed and its `up` [out, r] is B transposed; its scale is 1.

  Returns:
    {"blocks_1": {"attn": {"qkv": {"lora_a", "lora_b"}, ...}}}, to be merged into the parameters of a trunk.

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
    part = {"down": "lora_a", "up": "lora_b"}[match[3]]
    adapters[f"blocks_{match[1]}/{names[match[2]]}/{part}"] = jnp.asarray(np.asarray(value).T)
  if unexpected:
    raise ValueError(f"lora state_dict: unexpected {unexpected}")
  return unflatten_dict(adapters, sep="/")
