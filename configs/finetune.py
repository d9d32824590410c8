"""A published image and text model, fine-tuned by LoRA on pairs of your own, with codebooks on top.

Command: python -m codebind_jax.main --config=configs/finetune.py:WEIGHTS --config.data.files=pairs.jsonl \
           --workdir=runs/finetune
WEIGHTS is a checkpoint with images and texts: a folder of CLIP, SigLIP or OpenCLIP, big_vision .npz, ImageBind .pth.


Memory and time of a step beforehand: --config.mode=compile --config.topology=v5e:2x2. For ViT-B/32 at 256 rows,
64 a chip, it gives 2.6 GB a chip and 34 ms (the compiler's estimate); a GPU needs about as much memory. It also trains,
slowly, on a CPU.

`--config.stages.pairs.tune.image=full` trains the whole image trunk, `frozen` the heads and codebooks alone.
`--config.stages.pairs.parts=4` runs the towers in four micro-batches, for batches larger than memory.
"""

from pathlib import Path

from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.families import family_of
from configs import common


def get_config(arg=""):
  if not arg:
    raise ValueError("configs/finetune.py: needs the weights; use configs/finetune.py:PATH")
  config = common.get_config()
  config.steps = 1000
  config.batch_size = 64
  config.baseline = False
  config.data.worlds = ()
  config.data.workers = 2
  config.data.templates = ("{}", "a photo of {}")
  config.data.eval_templates = config.data.templates
  config.optim.learning_rate = 5e-4
  # Published heads keep their place at first; adapters learn at a fifth of the rate of what is new.
  config.optim.rules = (
    (r"\w+/shared/.*(bias|scale)", 0.02, 0.0), (r"\w+/shared/.*", 0.02, 1.0), (r".*lora_[ab]", 0.2, 0.0),
    *config.optim.rules,
  )  # fmt: skip

  family = family_of(Path(arg).expanduser())
  for modality in ("image", "text"):
    options = {"weights": arg, "modality": modality}
    head = load_trunk(family, **options).head.module
    config.model.shared_dim = head.width
    config.model.towers[modality] = common.tower(
      family, options=options, cache=False, head="published", specific_dim=head.width * (modality == "image")
    )
  config.codebook.codes.image = 256

  config.stages.pairs = common.stage(
    config,
    pairs=(("image", "text"),),
    tune={"image": "lora", "text": "frozen"},
    unique_labels=False,
    code_rows=8,
    losses={"info_nce": 0.5, "info_nce_plain": 0.5, "commitment": 10.0, "code_contrast": 0.01,
            "code_matching": 0.05, "decomposition": 0.1, "specific_uniform": 1.0},
  )  # fmt: skip
  config.stage_order = ("pairs",)
  return config.lock()
