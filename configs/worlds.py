"""Towers, stage and templates of each packaged world, for the configs of the stages; not a config by itself.

Simulated modalities: thermal (long-wave infrared of catalogue meshes) and tactile (touch relief of photographs); depth,
points and Household's images are rendered. Numbers on them say so.
"""

from configs import common, stage1

LOSSES = {
  "info_nce": 0.5,
  "info_nce_plain": 0.5,
  "commitment": 10.0,
  "code_contrast": 0.01,
  "code_matching": 0.05,
  "decomposition": 0.1,
  "specific_uniform": 1.0,
}


def trains(*modalities):
  """Regexes of all parameter paths of the modalities."""
  return tuple(rf"{name}(/.*|_log_logit_scale)" for name in modalities)


def add(config, world, towers, pairs, *, templates, **stage):
  """Adds a world's towers and the stage that binds them, which freezes the bridges' heads and the shared codebook."""
  config.model.towers.update(towers)
  for name in towers:
    config.codebook.codes[name] = 256
  config.data.worlds = (*config.data.worlds, world)
  config.data.templates_of[world] = templates
  rows = 32 if config.data.profile == "tiny" else 128  # Household's tiny profile has 48 labels to train on
  usual = {"pairs": pairs, "train": trains(*towers), "codes": tuple(towers), "temperature": 0.1, "code_rows": 8,
           "losses": LOSSES, "sources": {world: rows}}  # fmt: skip
  config.stages[world] = common.stage(config, **(usual | stage))
  config.stage_order = (*config.stage_order, world)


def household(config):
  """Depth and points (rendered) and thermal (simulated) of catalogue objects, bound to their colour views and names."""
  sensor = lambda modality: common.tower(
    "efficientnet_lite0", options={"modality": modality, "size": 128, "grid": 0, "levels": (5, 6, 7)}, specific_dim=384
  )
  towers = {"depth": sensor("depth"), "thermal": sensor("thermal")}
  towers["points"] = common.tower("point_views", options={"metric": True}, specific_dim=384)
  bridges = ("text", "image")
  add(config, "household", towers, tuple((m, b) for m in towers for b in bridges),
      templates=("{}", "a {}", "a 3D model of a {}"))


def materials(config):
  """Touch (simulated) of surfaces, bound to photographs of the same place."""
  towers = {"tactile": common.tower(
    "efficientnet_lite0", options={"modality": "tactile", "size": 128, "grid": 0, "levels": (5, 6, 7)}, specific_dim=384
  )}
  add(config, "materials", towers, (("tactile", "image"), ("tactile", "text")),
      templates=("{}", "a surface of {}"), unique_labels=False)


def menagerie(config):
  """Sounds and, in profile full, animated clips, bound to what they are called."""
  towers = {"audio": common.tower("aisfx", specific_dim=384)}
  pairs = [("audio", "text")]
  if config.data.profile == "full":
    image = config.model.towers.image.to_dict()  # the video's heads start from the image's, so that tokens must agree
    options = {key: value for key, value in image.pop("options").items() if key != "modality"}
    towers["video"] = common.tower(**image | {"trunk": "video_mean", "options": options, "starts_from": "image"})
    pairs.append(("video", "text"))
  add(config, "menagerie", towers, tuple(pairs), templates=("{}", "the sound of a {}", "a {}"))


def evoked(config):
  """EEG of one person who hears tones or sees checkerboards, bound to the stimulus' name.

  173 epochs suffice for a linear map of all patches and few steps, not for an encoder of patches.
  """
  towers = {"eeg": common.tower("eeg_patches", options={"flat": True}, specific_dim=64)}
  add(config, "evoked", towers, (("eeg", "text"),), templates=("{}",), unique_labels=False, mixup=1.0,
      steps=min(60, config.steps))


STAGES = {"household": household, "materials": materials, "menagerie": menagerie, "evoked": evoked}
EMERGENT = (("audio", "video"), ("audio", "depth"), ("audio", "points"), ("thermal", "points"))
FORMS = ("runlocal", "full")


def parse(words, *also):
  """(form: runlocal, full or ""; names of worlds) of the words after the config's colon; `also` is allowed too."""
  for word in words:
    if word not in (*FORMS, *STAGES):
      raise ValueError(f"config argument {word!r} is not allowed; allowed: {', '.join((*FORMS, *STAGES, *also))}")
  return next((word for word in words if word in FORMS), ""), [word for word in words if word in STAGES]


def bridges(form):
  """The config of stage 1, as the first of several."""
  config = stage1.get_config("runlocal" if form == "runlocal" else "").unlock()
  if form == "full":
    config.data.profile = "full"
  return config


def build(config, chosen):
  """Adds the stages of the chosen worlds to a stage 1 config."""
  icons = config.stage_order[0]
  config.stages[icons].sources = {"icons": config.get_oneway_ref("batch_size")}
  config.data.templates_of.icons = config.data.templates
  config.data.templates = config.data.eval_templates = ("{}",)
  for name in chosen:
    STAGES[name](config)
  present = set(config.model.towers)
  config.emergent = tuple(pair for pair in EMERGENT if present.issuperset(pair))


def add_joint(config, name, **stage):
  """Adds a stage that binds all pairs of those in `stage_order` on rows of all their worlds at once.

  It is not put into `stage_order`.
  """
  stages = [config.stages[name] for name in config.stage_order]
  pairs = tuple(dict.fromkeys(pair for stage in stages for pair in stage.pairs))
  sources = {world: stage.sources.get_oneway_ref(world) for stage in stages for world in stage.sources}
  usual = {"pairs": pairs, "sources": sources, "temperature": 0.1, "code_rows": 8, "unique_labels": False}
  config.stages[name] = common.stage(config, **(usual | stage))


def add_index(config):
  """Adds stage `index`, in which the codes of an index of few bytes start."""
  add_joint(config, "index", losses=common.SEARCHED)


def single(world, arg=""):
  """The config of one world's stage alone, with its data, and the towers of all stages up to it."""
  form, chosen = parse(common.words_of(arg))
  if chosen:
    raise ValueError(f"config argument {chosen[0]!r} is not allowed; allowed: {', '.join(FORMS)}")
  config = bridges(form)
  build(config, list(STAGES)[: list(STAGES).index(world) + 1])
  for name in [name for name in config.stages if name != world]:
    del config.stages[name]
  config.stage_order, config.data.worlds, config.emergent = (world,), (world,), ()
  return config.lock()
