"""The methods side by side on the synthetic world, with modalities of graded quality: same towers, data and steps.

Command: python -m codebind_jax.main --config=configs/compare.py --workdir=runs/compare
         (:runlocal for a quick look: one seed, no tuning; :ablations leaves parts of DCID out)
Writes comparison.md, comparison.json, bars.svg and anchors.svg; a second run of the command continues the first.
Several processes, or machines that share the folder, can each take some variants; the plain command then collects:
         ... --workdir=runs/compare --config.compare.only=dcid,fcid
"""

from ml_collections import ConfigDict

from configs import common

QUALITY = {"audio": 0.15, "depth": 0.35, "video": 0.6, "image": 1.0}
CODEBIND = {"info_nce": 1.0, "commitment": 10.0, "code_matching": 0.05, "decomposition": 0.1, "specific_uniform": 1.0}


def variant(method="codebind", quantize=True, losses=None, **options):
  entry = ConfigDict()
  entry.method, entry.quantize = method, quantize
  entry.options = ConfigDict(options)
  entry.losses = ConfigDict(losses or {"info_nce": 1.0})
  return entry


def get_config(arg=""):
  config = common.get_config()
  config.mode = "compare"
  config.steps = 400
  config.batch_size = 128
  config.log_steps = 50
  config.eval_steps = config.checkpoint_steps = 1000  # at the end
  config.data.worlds = ("synthetic",)
  config.model.shared_dim = 32
  config.codebook.dim = 4
  config.codebook.distance = "l2"
  config.codebook.normalize = False
  config.codebook.shared_codes = 256
  for sensor in QUALITY:
    config.model.towers[sensor] = common.tower(
      "raw", options={"width": 64, "modality": sensor}, body="mlp", body_options={"width": 128}, specific_dim=32
    )
    config.codebook.codes[sensor] = 64
  pairs = tuple((a, b) for a in QUALITY for b in QUALITY if a < b)
  config.stages.bind = common.stage(config, pairs=pairs, temperature=0.1, unique_labels=False, code_rows=8)
  config.stage_order = ("bind",)

  config.compare = ConfigDict()
  config.compare.only = ""  # names of variants with commas between: this call trains these alone
  config.compare.seeds = 3
  config.compare.learning_rates = (3e-4, 1e-3, 3e-3)
  config.compare.fields = ("label", "style")
  # The modality of lowest quality does not show the style at all: a factor that an anchor can lack.
  config.compare.world = ConfigDict({
    "classes": 10, "styles": 4, "noise": 0.8, "rows": 2048, "seed": 0, "quality": QUALITY,
    "style_quality": {"audio": 0.0},
  })  # fmt: skip
  unified = {"codes": 64, "reduce": "mean", "reset_after": 50}
  variants = {
    "info_nce": variant(quantize=False), "codebind": variant(losses=CODEBIND),
    **{f"fixed_anchor_{m}": variant("fixed_anchor", anchor=m, frozen=False) for m in QUALITY},
    "centrobind": variant("centrobind"), "centrobind_views": variant("centrobind", noise=0.3),
    "codis": variant("codis", codes=64, queue=512), "dcid": variant("dcid", **unified),
    "fcid": variant("fcid", hub="image", **unified),
  }
  if arg == "ablations":
    off = {
      "no_coding": {"coding": 0.0}, "no_club": {"club": 0.0}, "no_matching": {"matching": 0.0},
      "no_ema": {"own": 1.0}, "no_reset": {"reset_after": 0}, "no_ema_no_reset": {"own": 1.0, "reset_after": 0},
    }
    variants = {"dcid": variants["dcid"]} | {
      f"dcid_{name}": variant("dcid", **unified | options) for name, options in off.items()
    }
  config.compare.variants = ConfigDict(variants)

  if arg == "runlocal":
    config.steps = 60
    config.compare.seeds = 1
    config.compare.learning_rates = (2e-3,)
    config.compare.world.rows = 512
    for name in ("fixed_anchor_depth", "fixed_anchor_video", "centrobind_views"):
      del config.compare.variants[name]
  elif arg not in ("", "ablations"):
    raise ValueError(f"configs/compare.py:{arg}: unknown argument; allowed: runlocal, ablations")
  return config.lock()
