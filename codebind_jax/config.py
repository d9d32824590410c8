"""What a config may say: checked whole, before anything is built."""

from __future__ import annotations

import re

import ml_collections

from codebind_jax.schema import check_keys, get, has

MODES = ("train", "eval", "embed", "compare", "compile")
TASKS = ("zeroshot", "retrieval", "probe")
PROFILES = ("auto", "tiny", "tiny-plus", "small", "full")
_CHOICES = {
  "mode": MODES,
  "task": TASKS,
  "data.profile": PROFILES,
  "codebook.distance": ("cosine", "l2"),
  "codebook.layout": ("parts", "interleaved"),
  "codebook.update_mode": ("snapshot", "sequential"),
  "codebook.revive": ("random", "closest", "probrandom", "disturbance", "none"),
  "codebook.revive_mode": ("survive", "codes_only"),
  "embed.dtype": ("float16", "float32"),
}
_POSITIVE = (
  "steps", "batch_size", "log_steps", "eval_steps", "checkpoint_steps", "keep_checkpoints",
  "model.shared_dim", "codebook.dim", "codebook.shared_codes", "optim.learning_rate", "optim.clip_norm",
  "data.threads", "embed.shard_rows", "embed.batch_size", "embed.threads",
)
_COUNTS = ("data.max_bad_records", "data.workers", "seed")
_SHARES = ("codebook.decay", "codebook.alarm_share", "optim.b1", "optim.b2")


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks choices, ranges and references between sections.

  Raises:
    ValueError: naming the key, the value got, and what is allowed.
  """
  check_keys([get(config, "mode")], MODES, "mode")
  for path, allowed in _CHOICES.items():
    if has(config, path):
      check_keys([get(config, path)], allowed, path)
  for path in _POSITIVE:
    if has(config, path) and not get(config, path) > 0:
      raise ValueError(f"config.{path}: got {get(config, path)!r}; allowed: any number above 0")
  for path in _COUNTS:
    if has(config, path) and get(config, path) < 0:
      raise ValueError(f"config.{path}: got {get(config, path)!r}; allowed: 0 and up")
  for path in _SHARES:
    if has(config, path) and not 0 <= get(config, path) <= 1:
      raise ValueError(f"config.{path}: got {get(config, path)!r}; allowed: 0 to 1")
  if config.mode in ("eval", "embed"):
    for path in ("init_from", "data.manifest"):
      if not get(config, path):
        raise ValueError(f"config.{path}: must be set for mode {config.mode!r}")
    return
  _validate_train(config)


def _validate_train(config: ml_collections.ConfigDict) -> None:
  if config.optim.accumulate != 1:
    raise ValueError(
      f"config.optim.accumulate: got {config.optim.accumulate}; allowed: 1. Gradients summed over small batches are "
      "not those of a large one here: a row would see the negatives of its small batch alone, and the codebooks would "
      "move in between. For a batch larger than memory set stages.*.parts, which gives exactly the large batch's step"
    )
  from codebind_jax.data.worlds.registry import WORLDS
  from codebind_jax.methods.base import check_stage, make_method
  from codebind_jax.methods.codebind_terms import TERMS
  from codebind_jax.models.bodies import make_body
  from codebind_jax.stages import stages_of
  from codebind_jax.trunks import trunk_names
  from codebind_jax.trunks.featurize import CAPTION_MODES

  check_keys(config.tasks, (*TASKS, "codes"), "tasks")
  check_keys([config.data.captions], CAPTION_MODES, "data.captions")
  check_keys([world.split("-")[0] for world in config.data.worlds], WORLDS, "data.worlds")
  if not config.data.worlds and not config.data.manifest:
    raise ValueError(f"config.data.worlds: is empty; allowed: some of {sorted(WORLDS)}, or data.manifest set")
  if not 0 <= config.data.extra < 1:
    raise ValueError(f"config.data.extra: got {config.data.extra}; allowed: 0 (none) up to, not including, 1")
  towers = config.model.towers
  for name, tower in towers.items():
    check_keys([tower.trunk], trunk_names(), f"model.towers.{name}.trunk")
    if tower.specific_dim < 0 or tower.specific_dim % config.codebook.dim:
      raise ValueError(
        f"config.model.towers.{name}.specific_dim: got {tower.specific_dim}; allowed: 0 or a multiple of "
        f"codebook.dim ({config.codebook.dim})"
      )
    if not 0 <= tower.dropout < 1:
      raise ValueError(f"config.model.towers.{name}.dropout: got {tower.dropout}; allowed: 0 up to, not including, 1")
    if not 0 <= tower.whiten <= 1:
      raise ValueError(f"config.model.towers.{name}.whiten: got {tower.whiten}; allowed: 0 (off) to 1")
    if tower.whiten and tower.hidden:
      raise ValueError(
        f"config.model.towers.{name}.whiten: got {tower.whiten} with hidden {tower.hidden}; allowed: 0, or hidden 0"
      )
    if tower.views < 1 or not 0 <= tower.augmented <= 1:
      raise ValueError(
        f"config.model.towers.{name}: got views {tower.views}, augmented {tower.augmented}; allowed: 1 and up, 0 to 1"
      )
    if tower.body:
      make_body(tower.body, tower.body_options.to_dict())
      if tower.meaning or tower.whiten:
        raise ValueError(f"config.model.towers.{name}.body: {tower.body!r} goes with neither meaning nor whiten")
    if tower.starts_from:
      check_keys([tower.starts_from], [m for m in towers if m != name], f"model.towers.{name}.starts_from")
    if tower.meaning:
      check_keys([tower.meaning], [m for m in towers if m != name], f"model.towers.{name}.meaning")
      if tower.meaning_dim < 1:
        raise ValueError(f"config.model.towers.{name}.meaning_dim: got {tower.meaning_dim}; allowed: 1 and up")
    if tower.specific_dim and name not in config.codebook.codes:
      raise ValueError(f"config.codebook.codes: no entry for {name!r}, which has a specific part")
  if config.model.shared_dim % config.codebook.dim:
    raise ValueError(
      f"config.model.shared_dim: got {config.model.shared_dim}; allowed: a multiple of codebook.dim "
      f"({config.codebook.dim})"
    )
  check_keys(config.codebook.codes, towers, "codebook.codes")
  check_keys(config.stage_order, config.stages, "stage_order")
  method = make_method(config)
  for stage in stages_of(config):
    where = f"stages.{stage.name}"
    check_keys([m for pair in stage.pairs for m in pair], towers, f"{where}.pairs")
    check_keys(stage.losses, TERMS, f"{where}.losses")
    for pattern in stage.codes:
      if not any(re.fullmatch(pattern, name) for name in ("shared", *towers)):
        raise ValueError(f"config.{where}.codes: {pattern!r} matches none of {['shared', *sorted(towers)]}")
    decoder = config.model.decoder if stage.losses.get("reconstruction") else None
    if decoder and (min(decoder.width, decoder.heads, decoder.depth) < 1 or decoder.width % decoder.heads):
      raise ValueError(f"config.model.decoder: got {decoder.to_dict()}; allowed: above 0, heads divide width")
    for key in ("steps", "batch_size"):
      if getattr(stage, key) < 1:
        raise ValueError(f"config.{where}.{key}: got {getattr(stage, key)}; allowed: any number above 0")
    if stage.code_rows < 0:
      raise ValueError(f"config.{where}.code_rows: got {stage.code_rows}; allowed: 0 (all) and up")
    if not config.data.manifest:
      check_keys([*stage.sources, *stage.weights], config.data.worlds, f"{where}.sources")
    for source, rows in stage.sources.items():
      if rows < 1:
        raise ValueError(f"config.{where}.sources.{source}: got {rows}; allowed: any number above 0")
    for source, weight in stage.weights.items():
      if not weight > 0:
        raise ValueError(f"config.{where}.weights.{source}: got {weight}; allowed: any number above 0")
    if stage.learning_rate < 0:
      raise ValueError(f"config.{where}.learning_rate: got {stage.learning_rate}; allowed: 0 (config.optim's) and up")
    if stage.parts < 1:
      raise ValueError(f"config.{where}.parts: got {stage.parts}; allowed: 1 and up")
    if stage.chunk < 0:
      raise ValueError(f"config.{where}.chunk: got {stage.chunk}; allowed: 0 (the whole matrix) and up")
    if stage.mixup < 0:
      raise ValueError(f"config.{where}.mixup: got {stage.mixup}; allowed: 0 (off) and up")
    check_stage(config.method, stage)
    if stage.balance and not method.weights(stage).get(method.BASE):
      raise ValueError(f"config.{where}.balance: got True without the loss {method.BASE!r}, which others are held to")
    if not stage.temperature > 0:
      raise ValueError(f"config.{where}.temperature: got {stage.temperature}; allowed: any number above 0")
