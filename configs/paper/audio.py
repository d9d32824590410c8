"""The audio stage of CodeBind on ImageBind-Huge, with the publication's settings (arXiv 2605.18257).

Data: AudioSet, as a manifest with "audio", "image" and "text".
Published after this stage (top-1 %): AudioSet mAP 21.1, VGGSound 30.5, ESC-50 71.0.
Command: python -m codebind_jax.main --config=configs/paper/audio.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --config.init_from=runs/paper_image --workdir=runs/paper_audio
The trunk trains by LoRA of rank 4, image and text stay as they are.
100,000 steps: 40 epochs of what is still on line, in batches of 48 (6 on each of 8
devices); set `--config.steps` to yours.
"""

from configs import imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg, sensor="audio", rate=5e-5)
  config.steps = 100_000
  config.batch_size = 48
  imagebind.sensor_stage(config, "audio", "lora", temperature=0.05,
                         losses=imagebind.losses(50.0, 0.01, 1.0, 0.1, 1.0))
  return config.lock()
