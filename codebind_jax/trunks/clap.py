"""CLAP in Hugging Face layout (arXiv 2211.06687), without feature fusion: laion/clap-htsat-unfused, larger_clap_*.

Takes: sounds at 48,000 Hz; texts.
Choose it for: sounds and music with texts; permissive weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.audio import Mel
from codebind_jax.data.preparation.texts import Ids, text_input
from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.models.clap import ACTS, ClapAudio, ClapText
from codebind_jax.models.heads import Head
from codebind_jax.models.swin import SwinSpec
from codebind_jax.models.transformer import ACTIVATIONS, BlockSpec
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Entry, Weights, folder_weights
from codebind_jax.trunks.folders import family_config, folder_json, folder_tokenizer, has_tokenizer, model_type
from codebind_jax.trunks.options import Dtype, Name, Place

_REVISION = "clap-1"
MODALITIES = ("audio", "text")
LICENCE = "Apache-2.0 (LAION's weights)"

_TOWER = {"audio": "audio_model", "text": "text_model"}
_KINDS = {"clap": "", "clap_audio_model": "audio_model", "clap_text_model": "text_model"}
_PROJECTION = {"audio": "audio_projection", "text": "text_projection"}
_BATCH_NORM_EPS = 1e-5

_SWIN = "audio_model.audio_encoder."
_STAGE = _SWIN + "layers.{0}."
_BLOCK = _STAGE + "blocks.{1}."
_AT = r"swin/stage_(\d+)/block_(\d+)/"
_LAYER = "text_model.encoder.layer.{0}."
_PLACE = r"trunk/blocks_(\d+)/"


def _joined(attention: str) -> str:
  return "+".join(f"{attention}{part}.{{kind}}" for part in ("query", "key", "value"))


RULES = {
  "audio": (
    (r"mel_(scale|offset)", _SWIN + "batch_norm.{0}"),
    (r"swin/patch/\w+", _SWIN + "patch_embed.proj.{kind}"),
    (r"swin/patch_norm/\w+", _SWIN + "patch_embed.norm.{kind}"),
    (r"swin/norm/\w+", _SWIN + "norm.{kind}"),
    (_AT + r"norm1/\w+", _BLOCK + "layernorm_before.{kind}"),
    (_AT + r"norm2/\w+", _BLOCK + "layernorm_after.{kind}"),
    (_AT + r"attn/qkv/\w+", _joined(_BLOCK + "attention.self.")),
    (_AT + r"attn/table", _BLOCK + "attention.self.relative_position_bias_table"),
    (_AT + r"attn/out/\w+", _BLOCK + "attention.output.dense.{kind}"),
    (_AT + r"mlp/fc1/\w+", _BLOCK + "intermediate.dense.{kind}"),
    (_AT + r"mlp/fc2/\w+", _BLOCK + "output.dense.{kind}"),
    (r"swin/stage_(\d+)/merge_norm/\w+", _STAGE + "downsample.norm.{kind}"),
    (r"swin/stage_(\d+)/merge/\w+", _STAGE + "downsample.reduction.{kind}"),
    (r"hidden/\w+", "audio_projection.linear1.{kind}"),
  ),
  "text": (
    (r"stem/embed/\w+", "text_model.embeddings.word_embeddings.{kind}"),
    (r"stem/positions/\w+", "text_model.embeddings.position_embeddings.{kind}"),
    (r"stem/types/\w+", "text_model.embeddings.token_type_embeddings.{kind}"),
    (r"stem/norm/\w+", "text_model.embeddings.LayerNorm.{kind}"),
    (_PLACE + r"attn/qkv/\w+", _joined(_LAYER + "attention.self.")),
    (_PLACE + r"attn/out/\w+", _LAYER + "attention.output.dense.{kind}"),
    (_PLACE + r"norm1/\w+", _LAYER + "attention.output.LayerNorm.{kind}"),
    (_PLACE + r"mlp/fc1/\w+", _LAYER + "intermediate.dense.{kind}"),
    (_PLACE + r"mlp/fc2/\w+", _LAYER + "output.dense.{kind}"),
    (_PLACE + r"norm2/\w+", _LAYER + "output.LayerNorm.{kind}"),
    (r"pool/\w+", "text_model.pooler.dense.{kind}"),
    (r"hidden/\w+", "text_projection.linear1.{kind}"),
  ),
}
_OTHER = (
  r"logit_scale_[at]|text_model\.embeddings\.(position_ids|token_type_ids)|"
  r".*\.relative_position_index|.*\.num_batches_tracked"
)


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  return model_type(path) in _KINDS


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a folder has: their weights, and for text a tokenizer."""
  return tuple(m for m in names.towers_in(_weights(path), _TOWER) if m != "text" or has_tokenizer(path))


def _weights(path: Path) -> Weights:
  return with_folded_norm(folder_weights(path), _SWIN + "batch_norm.")


def with_folded_norm(weights: Weights, norm: str) -> Weights:
  """The checkpoint with one batch normalisation's arrays made to `<norm>scale` and `<norm>offset`."""
  parts = tuple(norm + part for part in ("weight", "bias", "running_mean", "running_var"))
  if any(part not in weights for part in parts):
    return weights

  def read(kind: str) -> np.ndarray:
    weight, bias, mean, variance = (weights[part].read().astype(np.float64) for part in parts)
    scale = weight / np.sqrt(variance + _BATCH_NORM_EPS)
    return (scale if kind == "scale" else bias - mean * scale).astype(np.float32)

  entry = functools.partial(Entry, weights[parts[0]].shape, np.dtype(np.float32))
  made = {norm + kind: entry(functools.partial(read, kind)) for kind in ("scale", "offset")}
  return Weights({name: entry for name, entry in weights.items() if name not in parts} | made, weights.files)


def mel_of(folder: Path, bands: int, most_frames: int) -> Mel:
  """The preparation that a folder's `preprocessor_config.json` describes; without one, that of clap-htsat-unfused.

  Args:
    folder: of the checkpoint.
    bands: mel bands that the encoder takes.
    most_frames: frames that it has room for.

  Raises:
    ValueError: naming the file, if it prepares sounds for another encoder.
  """
  file, settings = folder / "preprocessor_config.json", folder_json(folder, "preprocessor_config.json")
  nested = folder_json(folder, "processor_config.json").get("feature_extractor")
  if not settings and isinstance(nested, dict):
    file, settings = folder / "processor_config.json", nested
  if not settings:
    plain = Mel(bands=bands)
    return dataclasses.replace(plain, length=min(plain.length, (most_frames - 1) * plain.hop))
  if settings.get("truncation", "fusion") == "fusion":
    raise ValueError(f"{file}: truncation 'fusion' is for CLAP with feature fusion; allowed: 'rand_trunc'")
  rate = settings.get("sampling_rate", 48_000)
  mel = Mel(
    rate, int(settings.get("nb_max_samples", settings.get("max_length_s", 10) * rate)),
    settings.get("padding", "repeatpad"), settings.get("fft_window_size", 1024), settings.get("hop_length", 480),
    settings.get("feature_size", 64), float(settings.get("frequency_min", 0)),
    float(settings.get("frequency_max", 14_000)),
  )  # fmt: skip
  if mel.bands != bands or mel.shape[0] > most_frames:
    raise ValueError(f"{file}: gives spectrograms of {mel.shape}, the encoder takes {bands} bands and at most "
                     f"{most_frames} frames")  # fmt: skip
  return mel


def _known(table: Mapping[str, Any], name: str, key: str, where: Path) -> str:
  if name not in table:
    raise ValueError(f"{where}: {key} {name!r} is not supported; allowed: {', '.join(table)}")
  return name


def _audio(config: Mapping[str, Any], folder: Path, remat: bool, dtype: str) -> tuple[ClapAudio, Input]:
  where = folder / "config.json"
  get = lambda key, default: default if config.get(key) is None else config[key]
  pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
  size, bands = pair(get("spec_size", 256)), get("num_mel_bins", 64)
  spec = SwinSpec(
    get("patch_embeds_hidden_size", 96), tuple(get("depths", (2, 2, 6, 2))),
    tuple(get("num_attention_heads", (4, 8, 16, 32))), size, pair(get("patch_size", 4)), pair(get("patch_stride", 4)),
    get("window_size", 8), float(get("mlp_ratio", 4.0)),
    _known(ACTIVATIONS, get("hidden_act", "gelu"), "hidden_act", where), get("layer_norm_eps", 1e-5),
    get("qkv_bias", True), get("enable_patch_layer_norm", True),
  )  # fmt: skip
  module = ClapAudio(spec, bands, get("projection_dim", 512),
                     _known(ACTS, get("projection_hidden_act", "relu"), "projection_hidden_act", where), remat=remat,
                     dtype=dtype or None)  # fmt: skip
  mel = mel_of(folder, bands, size[1] * (size[0] // bands))
  return module, Input(mel.shape, "float32", mel, read=mel.read, revision=f"{audio_transforms.REVISION} {mel}")


def _text(config: Mapping[str, Any], folder: Path, **options: Any) -> tuple[ClapText, Input]:
  where = folder / "config.json"
  get = lambda key, default: default if config.get(key) is None else config[key]
  context, pad_id = get("max_position_embeddings", 514), get("pad_token_id", 1)
  spec = BlockSpec(
    get("num_attention_heads", 12), get("intermediate_size", 3072),
    _known(ACTIVATIONS, get("hidden_act", "gelu"), "hidden_act", where), get("layer_norm_eps", 1e-12), sum_norm=True,
  )  # fmt: skip
  module = ClapText(
    spec, get("hidden_size", 768), get("num_hidden_layers", 12), context, get("vocab_size", 50265),
    get("type_vocab_size", 1), pad_id, get("projection_dim", 512),
    _known(ACTS, get("projection_hidden_act", "relu"), "projection_hidden_act", where), **options,
  )  # fmt: skip
  tokenizer, settings = folder_tokenizer(folder), folder_json(folder, "tokenizer_config.json")
  named = lambda token: token if isinstance(token, str) else token["content"]
  pad, end = named(settings.get("pad_token") or "<pad>"), named(settings.get("eos_token") or "</s>")
  if (found := tokenizer.token_to_id(pad)) != pad_id:
    raise ValueError(f"{folder}: its tokenizer's padding {pad!r} is {found}, config.json has {pad_id}")
  if tokenizer.token_to_id(end) is None or tokenizer.encode("a").ids[-1:] != [tokenizer.token_to_id(end)]:
    raise ValueError(f"{folder}: its tokenizer does not put the end mark {end!r} after a text")
  length = min(context - pad_id - 1, int(settings.get("model_max_length") or context))
  collate = functools.partial(text_transforms.trim_to_bucket, pad_id=pad_id)
  return module, dataclasses.replace(text_input(Ids(tokenizer, length, pad_id)), collate=collate)


def make_trunk(
  *, weights: Place = "", modality: Name = "audio", dtype: Dtype = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """A tower of a CLAP checkpoint.

  Args:
    weights: folder in Hugging Face layout.
    modality: "audio" or "text".
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat: as in `models.transformer.Transformer`.
    scan: one block compiled once, for text alone; audio's stages are short and of different widths.

  Raises:
    ValueError: if the folder is no such checkpoint, lacks the modality, or has feature fusion.
  """
  folder = Path(weights).expanduser()
  config = family_config(weights, folder, _KINDS, "CLAP")
  audio_config = config.get("audio_config") or config
  if audio_config.get("enable_fusion"):
    raise ValueError(f"{folder / 'config.json'}: CLAP with feature fusion (enable_fusion) is not supported")
  there = _weights(folder)
  found = names.towers_in(there, _TOWER)
  if modality not in found:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(found) or 'no tower of CLAP'}")
  if modality == "audio":
    module, item = _audio(audio_config, folder, remat, dtype)
  else:
    module, item = _text(config.get("text_config") or config, folder, remat=remat, scan=scan, dtype=dtype or None)
  last = f"{_PROJECTION[modality]}.linear2"
  own = there.renamed(lambda name: name if name.startswith(f"{last}.") else "")
  others = [rf"({_TOWER[m]}|{_PROJECTION[m]})\..*" for m in MODALITIES if m != modality]
  scale = there.get({"audio": "logit_scale_a", "text": "logit_scale_t"}[modality])
  return Trunk(
    name="clap", modality=modality, module=module, input=item, licence=LICENCE,
    fingerprint=fingerprint({}, {"weights": there.hash(), "modality": modality, "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=RULES[modality],
                           ignored=(*others, _OTHER, rf"{last}\.(weight|bias)")),
    options={"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan},
    head=PublishedHead(
      Head(module.hidden, norm=False, bias=True),
      functools.partial(names.load, weights=own, rules=((r"proj/\w+", f"{last}.{{kind}}"),)),
      math.exp(scale.read().item()) if scale else 1.0,
    ),
  )  # fmt: skip
