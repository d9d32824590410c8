"""Comparisons on packaged worlds, for `configs/compare.py`; not a config by itself.

Trunks are frozen and their features cached, as in the stages; here one stage trains the heads of all modalities from
the start, for every method alike, on rows of two worlds a step.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Bytes, Compare
from configs import common, stage1, worlds

SIZES = (8, 12, 24, 48, 96, 192)  # bytes an item


def _packaged(form, chosen, sources, pairs):
  """A config with towers and data of the worlds, and one stage that binds the pairs on rows of all sources."""
  config = worlds.bridges(form)
  worlds.build(config, chosen)
  for name in list(config.stages):
    del config.stages[name]
  rows = 32 if form == "runlocal" else 128
  config.mode, config.eval_steps, config.checkpoint_steps = "compare", 100_000, 100_000  # at the end
  config.data.worlds, config.stage_order = sources, ("bind",)
  config.stages.bind = common.stage(
    config, pairs=pairs, sources=dict.fromkeys(sources, rows), temperature=0.1, code_rows=8
  )
  if "video" in config.model.towers:
    config.model.towers.video.starts_from = ""
  config.compare = ConfigDict(schema.defaults(Compare))
  config.compare.seeds = 1 if form == "runlocal" else 3
  config.compare.widen = 0 if form == "runlocal" else 2
  config.compare.learning_rates = (1e-3,) if form == "runlocal" else (1e-3, 3e-3, 1e-2, 3e-2)
  config.compare.stages = True
  return config


def transfer(sources, fields, val, test):
  """A transfer: heads that predict `fields`, trained on the sources; sets that a profile lacks are left out."""
  return ConfigDict({"worlds": sources, "fields": fields, "val": val, "test": test})


def real(form):
  """Household (depth, points, thermal, image, text) and Menagerie (audio, text)."""
  sensors = ("depth", "points", "thermal")
  pairs = (*((m, b) for m in sensors for b in ("text", "image")), ("image", "text"), ("audio", "text"))
  config = _packaged(form, ["household", "menagerie"], ("household", "menagerie"), pairs)
  config.compare.transfers.household = transfer(("household",), ("label",), ("household_val",), ("household_test",))
  sets = tuple(("menagerie_" + role + "_sounds", "menagerie_" + role + "_notes") for role in ("val", "test"))
  config.compare.transfers.menagerie = transfer(("menagerie",), ("label",), *sets)
  config.compare.score = "eval/val/cross"
  config.compare.columns = (
    "cross", "within", "household/label/cross", "menagerie/label/cross", "zeroshot", "retrieval",
  )  # fmt: skip
  return config


def generalise(form):
  """Cross-modal generalisation (CMG): sounds, pictures (clips in profile full) and their names, bound by the names.

  No row has both a sound and a picture. A head that predicts the concept is trained on the training rows of one
  modality and tested on held-out rows of another: pictures by unseen artists and sources, sounds from unseen sources.
  Clips are held out by concept, so that they train heads but do not test them.
  """
  pairs = [("image", "text"), ("audio", "text")] + [("video", "text")] * (form == "full")
  config = _packaged(form, ["menagerie"], ("icons", "menagerie"), tuple(pairs))
  sources = ("icons", "menagerie")
  val = ("icons_val_artist", "icons_gcompris", "menagerie_val_recordings", "menagerie_val_notes")
  test = ("icons_test_artist", "icons_qabcs", "menagerie_test_recordings", "menagerie_test_notes")
  config.compare.transfers.concepts = transfer(sources, ("concept",), val, test)
  config.compare.score = "eval/val/concept/cross"
  config.compare.columns = ("concept/cross", "concept/within", "zeroshot", "retrieval")
  return config


def small(form, sizes=(), *, lineage=()):
  """How well items of few bytes are found: pictures and names of Icons, as stage 1 binds them.

  Args:
    form: runlocal or "".
    sizes: bytes an item; empty for all.
    lineage: names of packaged worlds that the baseline is trained on, one after the other, after Icons; stage `index`,
      which is not in `stage_order`, is that of the codes.
  """
  if lineage:
    config = worlds.bridges(form)
    worlds.build(config, lineage)
    worlds.add_index(config)
  else:
    config = stage1.get_config(form).unlock()
    config.stages.bridges.mixup = 0.0  # variants have it, or not
  config.mode, config.baseline, config.eval_steps, config.checkpoint_steps = "compare", False, 100_000, 100_000
  config.compare = ConfigDict(schema.defaults(Compare))
  config.compare.seeds = 1 if form == "runlocal" else 3
  config.compare.widen = 0 if form == "runlocal" else 1
  config.compare.learning_rates = (1e-3,) if form == "runlocal" else (1e-3, 3e-3)
  config.compare.score = "eval/val/uncoded/score"
  sizes = sizes or ((12, 48) if form == "runlocal" else SIZES)
  config.compare.bytes = ConfigDict(schema.defaults(Bytes) | {"baselines": (), "sizes": sizes})
  return config
