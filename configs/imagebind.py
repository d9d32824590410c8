"""CodeBind on ImageBind's encoders: towers and stages of the published runs, for `imagebind_huge.py` and `paper/`.

Weights: `imagebind_huge.pth` (CC-BY-NC 4.0), given as the configs' argument; without them the parameters are drawn,
which is enough for mode `compile`.
"""

from codebind_jax.models.imagebind import HUGE
from configs import common

# Adapters on the last six of a sensor's blocks (the release's `lora_layers`); scanned blocks carry them in every layer.
LAST_SIX = {m: rf".*/blocks(_({'|'.join(str(i) for i in range(spec.depth - 6, spec.depth))}))?/(attn|mlp)/\w+"
            for m, spec in HUGE.items()}  # fmt: skip


def tower(modality, weights="", *, scan=True, **overrides):
  """A tower on ImageBind's encoder of a modality, whose shared head starts as ImageBind's own."""
  options = {"weights": weights, "modality": modality, "dtype": "bfloat16", "remat": True, "scan": scan}
  overrides = {"head": "published", "lora_layers": LAST_SIX[modality]} | overrides
  return common.tower("imagebind", options=options, cache=False, **overrides)


def losses(vq, reg, matching, decomposition, uniform):
  """The weights of a row of the published table (spec section 3)."""
  return {
    "info_nce": 1.0, "commitment": vq, "code_contrast": reg, "code_matching": matching,
    "decomposition": decomposition, "specific_uniform": uniform, "reconstruction": 1.0,
  }  # fmt: skip


def get_base(weights="", *, sensor="", tune="lora", rate=5e-4, new=False, **options):
  """Text and image, with a sensor's tower beside them, all of the published sizes.

  Args:
    weights: path of ImageBind's weights; "" draws them.
    sensor: the modality that the run binds; "" for image and text alone.
    tune: how the sensor's trunk trains.
    rate: learning rate of the trunk; new heads have 5e-4.
    new: ImageBind has no encoder of the sensor, whose trunk and heads start from random weights.
    **options: of the sensor's tower.
  """
  config = common.get_config()
  config.baseline = False
  config.data.worlds = ()
  config.optim.learning_rate = 5e-4
  config.model.shared_dim = 1024
  config.codebook.shared_codes = 1024
  config.model.towers.text = tower("text", weights)
  config.model.towers.image = tower("image", weights, specific_dim=1024)
  config.codebook.codes.image = 256
  if sensor:
    options = {"head": "linear"} | options if new else options
    config.model.towers[sensor] = tower(sensor, "" if new else weights, specific_dim=1024, **options)
    config.codebook.codes[sensor] = 256
    config.optim.rules = ((rf"{sensor}/trunk/.*", rate / 5e-4, 0.0 if tune == "lora" else 1.0), *config.optim.rules)
  # Frozen weights take half the memory; what trains stays float32.
  frozen = [m for m in config.model.towers if m != sensor or tune != "full"]
  config.model.half = (rf"({'|'.join(frozen)})/trunk/.*(kernel|embedding)",)
  config.model.decoder = {"width": 512, "depth": 8, "heads": 8}
  # The encoders' weights are split over 16 chips each where there are as many, the batch over all.
  config.mesh.data, config.mesh.fsdp = -1, 1
  return config


def sensor_stage(config, sensor, tune="lora", **overrides):
  """The stage that binds a sensor to image and text: its tower trains, theirs do not."""
  config.stages[sensor] = common.stage(
    config,
    pairs=((sensor, "image"), (sensor, "text")),
    train=(rf"{sensor}/.*", r"image/decoder/.*"),
    tune={"image": "frozen", "text": "frozen", sensor: tune},
    code_rows=64,
    **overrides,
  )
  config.stage_order = (sensor,)
