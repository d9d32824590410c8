"""Binds the modalities of your own data: looks at the data, makes the towers, and chooses pairs, batch and steps.

Command: python -m codebind_jax.main --config=configs/bind.py --config.data.files=mine.jsonl --workdir=runs/mine
         configs/bind.py:image,audio takes these modalities alone; docs/data.md says what each one's files may be.

The choice is printed as flags; whatever the command sets stays as it is. `--config.trunks.image=NAME`,
`--config.weights.image=PATH` (a published checkpoint: docs/models.md) and `--config.tune.image=frozen|lora|full`
choose the encoder of a modality, `--config.init_from=RUN` binds new modalities to a model that is there.
Time: on two cores 2 to 5 minutes for a thousand pictures with texts, most of it in encoders, whose output is kept.
"""

from ml_collections.config_dict import ConfigDict, placeholder

from codebind_jax.data.index import known_modalities
from configs import common, worlds


def towers():
  """Modality -> its packaged trunk and heads."""
  picture = lambda modality: common.tower(
    "efficientnet_lite0", options={"modality": modality, "size": 128, "grid": 0, "levels": (5, 6, 7)}, specific_dim=384
  )
  return {
    "text": common.tower("minilm", whiten=0.25),
    "image": common.tower(
      "efficientnet_lite0",
      options={"size": (160, 224), "crop": True, "grid": 0, "levels": (5, 6, 7), "class_names": "minilm"},
      meaning="text", meaning_dim=384, specific_dim=384,
    ),
    "video": common.tower(
      "video_mean", options={"size": (160,), "crop": True, "grid": 0, "levels": (5, 6, 7)}, specific_dim=384
    ),
    "audio": common.tower("aisfx", specific_dim=384),
    "depth": picture("depth"), "thermal": picture("thermal"), "tactile": picture("tactile"),
    "points": common.tower("point_views", specific_dim=384),
    "eeg": common.tower("eeg_patches", options={"flat": True}, specific_dim=64),
  }  # fmt: skip


def get_config(arg=""):
  config = common.get_config()
  config.mode = "bind"
  modalities = tuple(name for name in arg.split(",") if name)
  for name in modalities:
    if name not in known_modalities():
      raise ValueError(f"configs/bind.py:{arg}: unknown modality {name!r}; allowed: {', '.join(known_modalities())}")
  config.bind = ConfigDict({"modalities": modalities, "bridges": ()})
  for section in ("trunks", "weights", "tune"):
    config[section] = ConfigDict(dict.fromkeys(known_modalities(), ""))
  for name, tower in towers().items():
    if not modalities or name in modalities:
      config.model.towers[name] = tower
      if tower.specific_dim:
        config.codebook.codes[name] = 256
  config.codebook.dim = 2
  config.codebook.distance = "l2"
  config.codebook.normalize = False
  config.data.worlds = ()
  config.data.label_captions = True
  # The text head starts as a rotation of MiniLM's space and moves slowly; adapters learn slower than what is new.
  config.optim.rules = (
    (r"text/.*(bias|scale)", 0.1, 0.0), (r"text/.*", 0.1, 1.0), (r".*lora_[ab]", 0.2, 0.0), *config.optim.rules
  )  # fmt: skip

  # What is None is chosen by the data.
  for section, key, kind in (
    (config, "steps", int), (config, "batch_size", int), (config, "eval_steps", int), (config, "checkpoint_steps", int),
    (config, "log_steps", int), (config, "baseline", bool), (config.optim, "learning_rate", float),
    (config.optim, "warmup", int),
  ):  # fmt: skip
    del section[key]
    section[key] = placeholder(kind)
  config.stages.bind = common.stage(config, pairs=(), temperature=0.1, code_rows=8, losses=worlds.LOSSES)
  for key, kind in (("unique_labels", bool), ("mixup", float)):
    del config.stages.bind[key]
    config.stages.bind[key] = placeholder(kind)
  config.stage_order = ("bind",)
  return config.lock()
