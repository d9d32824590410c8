"""Encoder shapes of ImageBind-Huge and of the sensors that CodeBind adds."""

from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD
from codebind_jax.models.encoder import EncoderSpec

_VISION = {"size": (2, 224, 224), "patch": (2, 14, 14), "channels": 3, "stem_norm": False, "pre_norm": True,
           "bias_kv": False, "mean": CLIP_MEAN, "std": CLIP_STD}
_SQUARE = {"size": (224, 224), "patch": (16, 16)}

# ImageBind-Huge (arXiv 2305.05665) and the two sensors that CodeBind adds; the shared head is 1024 wide.
def _spec(width, depth, heads, size, patch=(), stride=(), **options):
  options = {"bias_kv": True} | options
  return EncoderSpec(heads, width=width, depth=depth, size=size, patch=patch, stride=stride, **options)


HUGE = {
  "image": _spec(1280, 32, 16, **_VISION),
  "text": _spec(1024, 24, 16, (77,), bias_kv=False),
  "audio": _spec(768, 12, 12, (128, 204), (16, 16), (10, 10)),
  "depth": _spec(384, 12, 8, **_SQUARE),
  "thermal": _spec(768, 12, 12, **_SQUARE),
  "imu": _spec(512, 6, 8, (2000,), (8,), channels=6),
  "tactile": _spec(768, 12, 12, channels=3, **_SQUARE),
  "eeg": _spec(768, 6, 6, (512,), (1,), channels=128, stem_bias=True),
}

# Initial value of the learnable factor on the cosine of the shared embedding; the image has none (spec section 1.7).
LOGIT_SCALES = {
  "image": 1.0, "text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0, "tactile": 5.0, "eeg": 5.0,
}
