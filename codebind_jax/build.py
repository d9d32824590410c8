"""From a config to the objects it names: the model and the quantiser's spec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax.core import FrozenDict

from codebind_jax.compositional import CompositionalSpec
from codebind_jax.models.bodies import make_body
from codebind_jax.models.towers import CodeBind, TowerSpec


def make_model(config: Any, **body: Any) -> CodeBind:
  """The towers of `config.model`; `body` overrides options of the bodies that have them.

  All modalities but text have decoders if a stage has the term `reconstruction`, else none has.
  """
  decoded = any(config.stages[name].losses.get("reconstruction") for name in config.stage_order)
  options = lambda given: given | {key: value for key, value in body.items() if key in given}
  towers = {
    name: TowerSpec(
      shared_dim=config.model.shared_dim,
      specific_dim=tower.specific_dim,
      hidden=tower.hidden,
      dropout=tower.dropout,
      init=tower.init,
      logit_scale=tower.logit_scale,
      meaning=tower.meaning,
      meaning_dim=tower.meaning_dim,
      body=tower.body,
      body_options=FrozenDict(options(tower.body_options.to_dict())),
      decoder=FrozenDict(config.model.decoder.to_dict() if decoded and name != "text" else {}),
    )
    for name, tower in config.model.towers.items()
  }
  return CodeBind(FrozenDict(towers))  # hashable, so that compiled steps can be shared


def make_spec(config: Any) -> CompositionalSpec | None:
  """The quantiser of `config.codebook`; None where `config.model.quantize` is off (the baseline)."""
  if not config.model.quantize:
    return None
  book = config.codebook
  return CompositionalSpec(
    shared_dim=config.model.shared_dim,
    specific_dims={name: tower.specific_dim for name, tower in config.model.towers.items()},
    code_dims=(book.dim, book.dim),
    num_codes=(book.shared_codes, 0),
    num_specific_codes=book.codes.to_dict(),
    layout=book.layout,
    distance=book.distance,
    normalize=book.normalize,
    decay=book.decay,
    revive=book.revive,
    revive_mode=book.revive_mode,
    detach_similarity=book.detach_similarity,
  )


def token_shapes(config: Any, modalities: Iterable[str]) -> dict[str, tuple[int, int]]:
  """Modality -> shape of one item's tokens as the model is fed them; loads the trunk where the body does not say."""
  from codebind_jax.trunks import load_trunk

  shapes = {}
  for name in modalities:
    tower = config.model.towers[name]
    body = make_body(tower.body, tower.body_options.to_dict()) if tower.body else None
    if hasattr(body, "token_shape"):
      shapes[name] = body.token_shape()
    else:
      trunk = load_trunk(tower.trunk, **tower.options.to_dict())
      shapes[name] = (trunk.num_tokens, trunk.width)
  return shapes
