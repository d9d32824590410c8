"""The eeg stage of CodeBind on ImageBind-Huge, with the publication's settings (arXiv 2605.18257).

Data: ImageNet-EEG, as a manifest with "eeg", "image" and "text".
Published after this stage (top-1 %): ImageNet-EEG 33.1.
Command: python -m codebind_jax.main --config=configs/paper/eeg.py:imagebind_huge.pth \
           --config.data.files=pairs.jsonl \
           --config.init_from=runs/paper_image --workdir=runs/paper_eeg
The trunk trains by LoRA of rank 4, image and text stay as they are.
4,980 steps: 7,970 pairs x 40 epochs in batches of 64 (8 on each of 8 devices).
ImageBind has no eeg encoder: trunk and shared head start from random weights.
"""

from configs import imagebind


def get_config(arg=""):
  config = imagebind.get_base(arg, sensor="eeg", rate=5e-4, new=True)
  config.steps = 4_980
  config.batch_size = 64
  config.model.towers.eeg.lora_layers = r".*/blocks(_[345])?/(attn|mlp)/\w+"
  imagebind.sensor_stage(config, "eeg", "lora", temperature=0.07,
                         losses=imagebind.losses(10.0, 0.01, 0.1, 0.05, 0.1))
  return config.lock()
