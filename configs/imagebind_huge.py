"""CodeBind on ImageBind-Huge's encoders, raw inputs through the model: the published audio stage for a pod.

Train on pairs of your own (one line of the manifest: {"audio": "a.wav", "image": "a.jpg", "text": "a dog barking"}):
  python -m codebind_jax.main --config=configs/imagebind_huge.py:imagebind_huge.pth --config.data.files=pairs.jsonl \
    --workdir=runs/huge
Memory and time of a step on a TPU slice, without a TPU and without weights (minutes on two cores; needs
pip install -e '.[tpu]'):
  python -m codebind_jax.main --config=configs/imagebind_huge.py --config.mode=compile --config.topology=v5e:16x16
  python -m codebind_jax.main --config=configs/imagebind_huge.py --config.mode=compile --config.topology=v5p:4x4x4
`:decoder` (with weights `:decoder,PATH`) adds the reconstruction of image and audio.

Image and text are frozen; audio's trunk trains by LoRA of rank 4, with its class token and heads; weights and rates are
those of the audio row of the publication (`configs/paper/audio.py`). The heads' cosines are divided by the temperature
alone: ImageBind's logit scales cancel in the release, because it normalises again.
"""

from configs import imagebind


def get_config(arg=""):
  form, _, weights = arg.partition(",") if arg.startswith("decoder") else ("", "", arg)
  config = imagebind.get_base(weights, sensor="audio", rate=5e-5)
  config.model.towers.audio.options.clips = 1  # of 2 s; the publication averages three
  config.steps = 10_000
  config.batch_size = 4096
  weights_of = imagebind.losses(50.0, 0.01, 1.0, 0.1, 1.0)
  if not form:
    del weights_of["reconstruction"]
  imagebind.sensor_stage(config, "audio", temperature=0.05, losses=weights_of)
  config.mesh.data, config.mesh.fsdp = -1, 16
  return config.lock()
