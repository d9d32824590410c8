"""Stage 1 of CodeBind on ImageBind-Huge: image and text, with the publication's settings (arXiv 2605.18257).

Data: ImageNet-1K and MSR-VTT frames, as a manifest with "image" and "text". Published after this stage (top-1 %):
ImageNet-1K 79.3, Places365 55.5, Kinetics-400 54.4; MSR-VTT recall@1 37.8.
Command: python -m codebind_jax.main --config=configs/paper/image.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --workdir=runs/paper_image
Both trunks are frozen; the shared heads move slowly (1e-5), the image's specific head is new (5e-4). 80,000 steps:
1.28 million pictures x 20 epochs in batches of 320 (40 on each of 8 devices).
"""

from configs import common, imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg)
  config.steps = 80_000
  config.batch_size = 320
  config.optim.rules = ((r"\w+/shared/.*", 1e-5 / 5e-4, 1.0), *config.optim.rules)
  config.stages.image = common.stage(
    config,
    pairs=(("image", "text"),),
    tune={"image": "frozen", "text": "frozen"},
    temperature=0.07,
    code_rows=64,
    losses=imagebind.losses(10.0, 0.01, 0.05, 0.1, 1.0),
  )
  config.stage_order = ("image",)
  return config.lock()
