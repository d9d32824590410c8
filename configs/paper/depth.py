"""The depth stage of CodeBind on ImageBind-Huge, with the publication's settings (arXiv 2605.18257).

Data: SUN RGB-D (depth as disparity), as a manifest with "depth", "image" and "text".
Published after this stage (top-1 %): SUN-D 45.7, NYU-D 59.3.
Command: python -m codebind_jax.main --config=configs/paper/depth.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --config.init_from=runs/paper_image --workdir=runs/paper_depth
The trunk trains by LoRA of rank 4, image and text stay as they are.
2,640 steps: 5,285 pairs x 40 epochs in batches of 80 (10 on each of 8 devices).
"""

from configs import imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg, sensor="depth", rate=5e-4)
  config.steps = 2_640
  config.batch_size = 80
  imagebind.sensor_stage(config, "depth", "lora", temperature=0.07,
                         losses=imagebind.losses(1000.0, 0.01, 0.1, 0.1, 1.0))
  return config.lock()
