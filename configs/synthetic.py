"""All nine modalities on the synthetic world, bound stage by stage: seconds, no download; for smoke runs and tests.

Command: python -m codebind_jax.main --config=configs/synthetic.py --workdir=runs/synthetic
         (:runlocal for the smallest form)
Time: a few minutes on 2 idle CPU cores. What each part should hold at the end: docs/decomposition.md.
"""

from configs import common

SENSORS = ("image", "video", "audio", "depth", "thermal", "tactile", "points", "eeg")
WORLDS = ("synthetic-image-video-text", "synthetic-image-depth-thermal-points-text", "synthetic-image-tactile-text",
          "synthetic-audio-text", "synthetic-eeg-text")


def get_config(arg=""):
  config = common.get_config()
  config.steps = 300
  config.batch_size = 256
  config.data.worlds = WORLDS
  config.data.profile = "small"
  config.data.captions = "joined"  # each names the class, every second one the style as well
  # Narrow parts: features that vary by chance correlate by sqrt(32 * 32) / 256 of `decorrelation`, wide ones by more.
  config.model.shared_dim = 32
  config.optim.learning_rate = 3e-3
  config.codebook.dim = 4
  config.codebook.distance = "l2"
  config.codebook.normalize = False
  config.codebook.shared_codes = 256
  config.model.towers.text = common.tower("hashed_words", options={"width": 64})
  for sensor in SENSORS:
    config.model.towers[sensor] = common.tower(
      "mlp", options={"inputs": 64, "modality": sensor, "width": 256}, cache=False, specific_dim=32,
    )
    config.codebook.codes[sensor] = 128
  config.emergent = (("audio", "video"), ("audio", "depth"), ("audio", "points"), ("thermal", "points"))

  losses = {"info_nce": 1.0, "commitment": 10.0, "code_contrast": 0.01, "code_matching": 0.05,
            "decomposition": 0.1, "decorrelation": 2.0, "specific_uniform": 1.0, "reconstruction": 1.0}
  new = lambda *names: tuple(rf"{name}(/.*|_log_logit_scale)" for name in names)
  stages = {
    "bridges": (("image", "text"), ("video", "text")),
    "household": (("depth", "text"), ("depth", "image"), ("thermal", "image"), ("points", "text"),
                  ("points", "image")),
    "materials": (("tactile", "image"),),
    "menagerie": (("audio", "text"),),
    "evoked": (("eeg", "text"),),
  }  # fmt: skip
  for (name, pairs), world in zip(stages.items(), WORLDS):
    targets = [m for m in dict.fromkeys(m for pair in pairs for m in pair) if m in world and m not in ("image", "text")]
    trained = (".*",) if name == "bridges" else new(*targets)
    config.stages[name] = common.stage(
      config, pairs=pairs, train=trained, temperature=0.1, code_rows=8, losses=losses,
      sources={world: config.get_oneway_ref("batch_size")}, unique_labels=False,
    )
  config.stage_order = tuple(stages)

  if arg == "runlocal":
    config.steps = 40
    config.eval_steps = 1000
    config.data.profile = "tiny"
  elif arg:
    raise ValueError(f"configs/synthetic.py:{arg}: unknown argument; allowed: runlocal")
  return config.lock()
