"""CodeBind on ImageBind-Huge's encoders, raw inputs through the model, LoRA of rank 4: the size of the published run.

Memory and time of a step on a TPU slice, without a TPU (minutes on two cores; needs pip install -e '.[tpu]'):
  python -m codebind_jax.main --config=configs/imagebind_huge.py --config.mode=compile --config.topology=v5e:16x16
  python -m codebind_jax.main --config=configs/imagebind_huge.py --config.mode=compile --config.topology=v5p:4x4x4
`:decoder` adds the reconstruction of image and audio, to measure its cost.
Training needs the public ImageBind weights (loader: `models/imagebind_weights.py`), images, audio and text.
"""

from configs import common

LORA = (r".*lora_[ab]", r".*/(shared|specific)/.*", r".*log_logit_scale", r"audio/body/encoder/stem/cls_token")


def encoder(modality, lora_rank=0, **overrides):
  """A tower whose body is ImageBind's encoder of a modality."""
  body = {"modality": modality, "remat": True, "scan": True, "dtype": "bfloat16", "lora_rank": lora_rank}
  return common.tower("raw_input", options={"modality": modality}, body="encoder", body_options=body, **overrides)


def get_config(arg=""):
  config = common.get_config()
  config.steps = 10_000
  config.batch_size = 4096
  config.baseline = False
  config.optim.learning_rate = 5e-4

  config.model.shared_dim = 1024
  config.model.towers.image = encoder("image", specific_dim=1024)
  config.model.towers.text = encoder("text", logit_scale=1 / 0.07)
  config.model.towers.audio = encoder("audio", specific_dim=1024, lora_rank=4, logit_scale=20.0)
  config.model.half = (r".*/body/encoder/.*(kernel|embedding)",)  # frozen; adapters and heads stay float32
  config.codebook.codes.image = 1024
  config.codebook.codes.audio = 1024
  config.optim.rules = ((r".*lora_[ab]", 1.0, 0.0), *config.optim.rules, (r".*", 1.0, 0.0))

  config.stages.audio = common.stage(
    config,
    pairs=(("audio", "image"), ("audio", "text")),
    train=LORA,
    code_rows=64,
    losses={"info_nce": 1.0, "commitment": 1.0, "code_contrast": 0.01, "code_uniform": 0.01, "code_matching": 0.05,
            "decomposition": 0.1, "specific_uniform": 1.0},
  )
  config.stage_order = ("audio",)
  # The encoders' weights are split over 16 chips each, the batch over all.
  config.mesh.data, config.mesh.fsdp = -1, 16

  if arg == "decoder":
    config.model.decoder = {"width": 512, "depth": 8, "heads": 8}
    config.stages.audio.losses.reconstruction = 1.0
    config.stages.audio.train = (*LORA, r".*/decoder/.*")
  elif arg:
    raise ValueError(f"configs/imagebind_huge.py:{arg}: unknown argument; allowed: decoder")
  return config.lock()
