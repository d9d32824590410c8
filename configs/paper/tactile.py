"""The tactile stage of CodeBind on ImageBind-Huge, with the publication's settings (arXiv 2605.18257).

Data: Touch and Go, as a manifest with "tactile", "image" and "text".
Published after this stage (top-1 %): TAG material 42.6, hard/soft 83.9, rough/smooth 78.2.
Command: python -m codebind_jax.main --config=configs/paper/tactile.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --config.init_from=runs/paper_image --workdir=runs/paper_tactile
The trunk trains in full, image and text stay as they are.
6,000 steps: 40 epochs in batches of 80 (10 on each of 8 devices); set `--config.steps` to your split.
ImageBind has no tactile encoder: trunk and shared head start from random weights.
"""

from configs import imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg, sensor="tactile", tune="full", rate=5e-4, new=True)
  config.steps = 6_000
  config.batch_size = 80
  imagebind.sensor_stage(config, "tactile", "full", temperature=0.07,
                         losses=imagebind.losses(1000.0, 0.01, 0.1, 0.1, 1.0))
  return config.lock()
