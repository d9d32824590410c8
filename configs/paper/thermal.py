"""The thermal stage of CodeBind on ImageBind-Huge, with the publication's settings (arXiv 2605.18257).

Data: LLVIP, as a manifest with "thermal", "image" and "text".
Published after this stage (top-1 %): LLVIP 95.5, FLIR_v2 97.2.
Command: python -m codebind_jax.main --config=configs/paper/thermal.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --config.init_from=runs/paper_image --workdir=runs/paper_thermal
The trunk trains by LoRA of rank 4, image and text stay as they are.
6,010 steps: 12,025 pairs x 40 epochs in batches of 80 (10 on each of 8 devices).
"""

from configs import imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg, sensor="thermal", rate=5e-5)
  config.steps = 6_010
  config.batch_size = 80
  imagebind.sensor_stage(config, "thermal", "lora", temperature=0.1,
                         losses=imagebind.losses(100.0, 0.01, 0.5, 0.5, 1.0))
  return config.lock()
