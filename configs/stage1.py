"""Stage 1: bind text and images with the shared codebook and the image's own, on the packaged Icons world.

Command: python -m codebind_jax.main --config=configs/stage1.py --workdir=runs/stage1
         (add :runlocal to the config for the quick form)
An index of few bytes an item, 12 here (docs/codes.md), whose codes start from the continuous model of such a run, by
default the one above:
         ... --config=configs/stage1.py:12 --workdir=runs/small --config.init_from=runs/stage1/baseline
"""

from configs import common


def get_config(arg=""):
  config = common.get_config()
  config.steps = 300
  config.eval_steps = 150
  config.optim.learning_rate = 1e-3
  config.optim.warmup = 30
  config.data.captions = "joined"  # a tag alone, such as "animal", fits too many icons
  config.data.templates = ("{}", "an image of {}", "an icon of {}", "a drawing of {}", "a photo of {}")
  config.data.eval_templates = config.data.templates

  config.model.towers.image = common.tower(
    "efficientnet_lite0",
    options={
      "size": (160, 224), "crop": True, "grid": 0, "levels": (5, 6, 7), "lines": 160, "class_names": "minilm"
    },
    meaning="text", meaning_dim=384, specific_dim=384,
  )
  config.model.towers.text = common.tower("minilm", whiten=0.25)
  config.codebook.codes.image = 256
  config.codebook.dim = 2
  config.codebook.distance = "l2"
  config.codebook.normalize = False

  # The text head starts as a rotation of MiniLM's space and moves slowly: words never trained on keep their place.
  config.optim.rules = ((r"text/.*(bias|scale)", 0.1, 0.0), (r"text/.*", 0.1, 1.0), *config.optim.rules)

  config.stages.bridges = common.stage(
    config,
    pairs=(("image", "text"),),
    temperature=0.1,
    mixup=1.0,
    code_rows=8,
    losses={
      "info_nce": 0.5,
      "info_nce_plain": 0.5,
      "commitment": 10.0,
      "code_contrast": 0.01,
      "code_matching": 0.05,
      "decomposition": 0.1,
      "specific_uniform": 1.0,
    },
  )
  config.stage_order = ("bridges",)

  words, size = common.words_and_size(arg)
  if set(words) - {"runlocal"}:
    raise ValueError(f"configs/stage1.py:{arg}: unknown argument; allowed: runlocal, and a number of bytes an item")
  if "runlocal" in words:
    config.steps = 60
    config.batch_size = 128
    config.eval_steps = 60
    config.checkpoint_steps = 30
    config.log_steps = 10
    config.data.profile = "tiny"
  if size:
    common.start_small_index(config, size, "runs/stage1/baseline")
  return config.lock()
