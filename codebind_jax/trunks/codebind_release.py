"""The CodeBind release (arXiv 2605.18257): a folder of one file a module and modality, over an ImageBind checkpoint.

  imagebind-{module}-{modality}{postfix}.pth        preprocessors, trunks (where tuned whole), heads, heads_mvq,
                                                    postprocessors[_new], decoder_trunk, decoder_head
  imagebind-{module}{postfix}.pth                   a module of all modalities
  imagebind-vector_quantise-{postfix}.pth           the codebooks
  imagebind-lora-{modality}{postfix}.safetensors    adapters of a trunk
  cfg_all_train.yaml                                the settings, here or in the folder above

A file's names begin inside its module: here they get ImageBind's prefixes back, and the base checkpoint fills the rest.

Takes: what ImageBind takes, and touch and EEG.
Choose it for: to start from, or to compare with, the authors' own weights.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from absl import logging
from flax.traverse_util import flatten_dict

from codebind_jax.codebook.spec import SHARED
from codebind_jax.codebook.state import CodebookState
from codebind_jax.data.preparation.imagebind import BASELINE, FOCAL_LENGTH, item_input
from codebind_jax.models.decoder import Decoder, decoder_for
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.models.lora import from_release, merge
from codebind_jax.trunks import imagebind, names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import SHAPES, Entry, Weights, note, open_weights, present
from codebind_jax.trunks.options import Camera, Count, Crops, Dtype, Line, Name, Place

_REVISION = "codebind-release-1"
LICENCE = "CC-BY-NC 4.0 (trained from Meta's ImageBind: no commercial use)"

_PREFIXES = {
  "preprocessors": "modality_preprocessors", "trunks": "modality_trunks", "heads": "modality_heads",
  "heads_mvq": "modality_heads_mvq", "postprocessors": "modality_postprocessors", "decoder_trunk": "decoder_trunks",
  "decoder_head": "decoder_heads",
}  # fmt: skip
_MODULES = (*_PREFIXES, "postprocessors_new", "vector_quantise", "lora", "mvq_adapter")
_OFFICIAL = tuple(dict.fromkeys(map(imagebind.official_name, imagebind.MODALITIES)))
_FILE = re.compile(
  rf"imagebind-(?P<module>{'|'.join(sorted(_MODULES, key=len, reverse=True))})"
  rf"(?:-(?P<modality>{'|'.join(_OFFICIAL)}))?-?(?P<postfix>_\w+)?\.(?:pth|safetensors)"
)
_POSTFIXES = ("_best", "_last")
_NOT_HERE = "holds no file of the CodeBind release (imagebind-heads-vision_best.pth and the like)"
_UNUSED = r"decoder_heads\.\w+\.(hid_conv|out_conv)\..*"  # convolutions that the release never calls
_DISTANCES = {"cos": "cosine", "l2": "l2"}
_LAYOUTS = {1: "parts", 2: "interleaved"}


def ours(official: str) -> str:
  """This library's name of a modality or codebook."""
  return {"vision": "image", "common": SHARED}.get(official, official)


def decoder_rules(modality: str) -> names.Rules:
  """Names of a `Decoder`'s parameters."""
  trunk, head = (f"decoder_{kind}.{imagebind.official_name(modality)}." for kind in ("trunks", "heads"))
  block = trunk + "decoder_blocks.{0}."
  return (
    (r"positions", trunk + "pos_embed"),
    (r"input_proj/\w+", trunk + "decoder_input_proj.{kind}"),
    (r"input_norm/\w+", trunk + "input_proj_norm.{kind}"),
    (r"embed/\w+", trunk + "decoder_embed.{kind}"),
    (r"norm/\w+", trunk + "norm.{kind}"),
    (r"blocks_(\d+)/attn/qkv/\w+", block + "attn.qkv.{kind}"),
    (r"blocks_(\d+)/attn/out/\w+", block + "attn.proj.{kind}"),
    (r"blocks_(\d+)/mlp/(fc[12])/\w+", block + "mlp.{1}.{kind}"),
    (r"blocks_(\d+)/norm([12])/\w+", block + "norm{1}.{kind}"),
    (r"deconv/\w+", head + "deconv.{kind}"),
  )


def decoder_weights(weights: Weights, modality: str) -> Weights:
  """The arrays of one modality's decoder, without the convolutions that are never used."""
  m = imagebind.official_name(modality)
  part = imagebind.part_of(weights, f"decoder_trunks.{m}.", f"decoder_heads.{m}.")
  return part.renamed(lambda name: "" if re.fullmatch(_UNUSED, name) else name)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Widths of a release, and how it quantises.

  Attributes:
    shared_dim: width of the shared part.
    specific_dims: modality -> width of its specific part, 0 for none.
    code_dims, codes: codebook ("shared" or a modality) -> width of its codes, number of codes.
    distance, normalize, layout: as in `codebook.spec.CompositionalSpec`.
  """

  shared_dim: int
  specific_dims: Mapping[str, int]
  code_dims: Mapping[str, int]
  codes: Mapping[str, int]
  distance: str
  normalize: bool
  layout: str


@dataclasses.dataclass(frozen=True)
class Release:
  """An opened release.

  Attributes:
    folder: where its files lie.
    weights: all arrays under ImageBind's names, adapters folded into the trunks' weights.
    books: the codebooks' arrays.
    modalities: those with heads of this release.
    adapted: those of them whose trunk has adapters.
    settings: content of `cfg_all_train.yaml`; {} without one.
  """

  folder: Path
  weights: Weights = dataclasses.field(repr=False)
  books: Weights = dataclasses.field(repr=False)
  modalities: tuple[str, ...]
  adapted: tuple[str, ...]
  settings: Mapping[str, Any] = dataclasses.field(repr=False)

  def encoder_spec(self, modality: str, heads: int = 0) -> EncoderSpec:
    """The encoder's shape; `heads` as in `imagebind.encoder_spec`."""
    return imagebind.encoder_spec(self.weights, modality, heads)

  def sizes(self) -> Sizes:
    """Widths, numbers of codes, and how features are quantised.

    Raises:
      ValueError: for a kind of quantiser that is not supported.
    """
    setting = functools.partial(_setting, self.settings)
    for key in ("share_codebook", "seperate_codebook"):  # the release's spelling
      if setting(key, False):
        raise ValueError(f"{self.folder}: its setting {key} is not supported; allowed is false")
    distance, layout = setting("distance", "cos"), setting("seg_type", 1)
    if distance not in _DISTANCES or layout not in _LAYOUTS:
      raise ValueError(f"{self.folder}: distance {distance!r}, seg_type {layout!r}; allowed: cos or l2, 1 or 2")
    shapes = {ours(name): self.books[f"mvq_dict.{name}.embedding.weight"].shape for name in self._book_names()}
    return Sizes(
      shared_dim=self.shared_dim,
      specific_dims={m: self._specific_dim(m) for m in self.modalities},
      code_dims={name: shape[1] for name, shape in shapes.items()},
      codes={name: shape[0] for name, shape in shapes.items()},
      distance=_DISTANCES[distance], normalize=bool(setting("norm_code", True)), layout=_LAYOUTS[layout],
    )  # fmt: skip

  def encoder(self, shapes: Any, modality: str) -> Any:
    """Parameters of an `Encoder`, shaped as `shapes`, adapters merged."""
    part = imagebind.encoder_weights(self.weights, modality)
    return names.load(shapes, part, imagebind.encoder_rules(modality))

  def heads(self, modality: str) -> dict[str, Any]:
    """Parameters of the linear heads, `shared` and, where the modality has one, `specific`.

    Where the release has one head for both parts (`use_both_head: false`), it is cut in two, which gives the same.
    """
    if self._joint(modality):
      joint, cut = self._head("modality_heads_mvq", modality), self.shared_dim
      kernel = joint["proj"]["kernel"]
      parts = {"shared": kernel[:, :cut], "specific": kernel[:, cut:]}
      return {k: {"norm": joint["norm"], "proj": {"kernel": v}} for k, v in parts.items() if v.shape[1]}
    heads = {"shared": self._head("modality_heads", modality)}
    if self._specific_dim(modality):
      heads["specific"] = self._head("modality_heads_mvq", modality)
    return heads

  def decoder(self, modality: str, heads: int = 8) -> tuple[Decoder, Any] | None:
    """The modality's decoder and its parameters, or None if it has none; `heads` of its blocks."""
    part, m = decoder_weights(self.weights, modality), imagebind.official_name(modality)
    if not len(part):
      return None
    trunk = f"decoder_trunks.{m}."
    spec = dataclasses.replace(self.encoder_spec(modality, heads=1), heads=1)
    options = {"width": part[trunk + "decoder_embed.weight"].shape[0], "heads": heads,
               "depth": names.depth_of(part, r"decoder_blocks\.(\d+)\.")}  # fmt: skip
    if trunk + "decoder_input_proj.weight" in part:
      decoder, width = decoder_for(spec, **options), part[trunk + "decoder_input_proj.weight"].shape[1]
    else:
      rows, width = part[trunk + "pos_embed"].shape[-2:]
      decoder = decoder_for(spec, trunk_dim=0, **options)
      decoder = dataclasses.replace(decoder, cls_token=rows == math.prod(decoder.grid) + 1)
    count = math.prod(decoder.grid) + decoder.cls_token
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = [array(1, count, width)]
    if decoder.trunk_dim:
      inputs += [array(1, count, spec.width), array(count, spec.width)]
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), *inputs)["params"]
    return decoder, names.load(shapes, part, decoder_rules(modality))

  def tower(self, modality: str) -> dict[str, Any]:
    """Parameters of one modality, as far as it has them: {trunk: {stem, trunk}, shared, specific, decoder}."""
    spec = self.encoder_spec(modality, heads=1)
    shapes = jax.eval_shape(Encoder(spec).init, jax.random.key(0), spec.example())["params"]
    params = {"trunk": self.encoder(shapes, modality), **self.heads(modality)}
    if decoder := self.decoder(modality):
      params["decoder"] = decoder[1]
    return params

  def towers(self) -> dict[str, dict[str, Any]]:
    """`tower` of every modality."""
    return {modality: self.tower(modality) for modality in self.modalities}

  def logit_scale(self, modality: str) -> float:
    """Factor on the cosine, 1 for images."""
    name = imagebind.scale_name(modality)
    scale = math.exp(self.weights[name].read().item()) if name in self.weights else 1.0
    return min(scale, imagebind.SCALE_LIMIT)

  def codebooks(self) -> dict[str, CodebookState]:
    """The codebooks' state: "shared", and each modality's own.

    Codes that the optimizer trained (`ema_update: false`) have no averages: they get counts of one.
    """
    states = {}
    for name in self._book_names():
      prefix = f"mvq_dict.{name}."
      read = {key.removeprefix(prefix): self.books[key].read() for key in self.books if key.startswith(prefix)}
      codes = jnp.asarray(read["embedding.weight"], jnp.float32)
      count = jnp.asarray(read.get("embedding.cluster_size", np.ones(len(codes))), jnp.float32)
      states[ours(name)] = CodebookState(
        codes=codes, ema_count=count, ema_sum=jnp.array(read.get("embedding.embed_avg", codes), jnp.float32, copy=True),
        usage=jnp.asarray(read.get("embed_prob", np.zeros(len(codes))), jnp.float32),
        initialised=jnp.asarray(bool(np.all(read.get("initted", True)))),
      )  # fmt: skip
      shapes = [codes.shape[:1], codes.shape, codes.shape[:1]]
      if [x.shape for x in (count, states[ours(name)].ema_sum, states[ours(name)].usage)] != shapes:
        raise ValueError(f"{self.books.name}: codebook {name!r}: counts, sums and usage do not fit {codes.shape} codes")
    return states

  def _book_names(self) -> list[str]:
    return [match[1] for name in self.books if (match := re.fullmatch(r"mvq_dict\.(\w+)\.embedding\.weight", name))]

  def _width(self, kind: str, modality: str) -> int:
    part = imagebind.part_of(self.weights, f"{kind}.{imagebind.official_name(modality)}.")
    return max((entry.shape[0] for entry in part.values() if len(entry.shape) == 2), default=0)

  def _specific_dim(self, modality: str) -> int:
    # A text's file may hold a second head, which the release never calls.
    width = 0 if modality == "text" else self._width("modality_heads_mvq", modality)
    return width - self.shared_dim if self._joint(modality) else width

  @property
  def shared_dim(self) -> int:
    """Width of the shared part.

    Raises:
      ValueError: if the modalities differ in it.
    """
    widths = {m: width for m in self.modalities if (width := self._width("modality_heads", m))}
    if len(set(widths.values())) != 1:
      raise ValueError(f"{self.folder}: the shared heads' widths {widths} must be one")
    return next(iter(widths.values()))

  def _joint(self, modality: str) -> bool:
    return (modality != "text" and self._width("modality_heads_mvq", modality) > 0
            and not _setting(self.settings, "use_both_head", True))  # fmt: skip

  def _head(self, kind: str, modality: str) -> Any:
    part = imagebind.part_of(self.weights, f"{kind}.{imagebind.official_name(modality)}.")
    wide = next((entry.shape for entry in part.values() if len(entry.shape) == 2), None)
    if wide is None:
      raise ValueError(f"{self.folder}: has no {kind} of {modality!r}")
    token = jax.ShapeDtypeStruct((1, 1, wide[1]), jnp.float32)
    shapes = jax.eval_shape(Head(wide[0]).init, jax.random.key(0), token)["params"]
    return names.load(shapes, part, imagebind.head_rules(modality, kind))


def _setting(settings: Mapping[str, Any], key: str, default: Any) -> Any:
  """Value of a key, in a section or above."""
  if key in settings:
    return settings[key]
  found = (_setting(value, key, None) for value in settings.values() if isinstance(value, Mapping))
  return next((value for value in found if value is not None), default)


def _files(folder: Path) -> tuple[Path, list[tuple[re.Match[str], Path]]]:
  """The folder that holds the release's files (it, or `checkpoints` in it), and those files, or their shapes."""
  for place in (folder, folder / "checkpoints"):
    if place.is_dir():
      there = sorted({path.name.removesuffix(SHAPES) for path in place.iterdir()})
      found = [(match, place / name) for name in there if (match := _FILE.fullmatch(name))]
      if found:
        return place, found
  return folder, []


def recognises(path: Path) -> bool:
  """Whether a path is a folder of this release."""
  try:
    return any(match["module"] in ("heads", "heads_mvq", "vector_quantise") for match, _ in _files(path)[1])
  except OSError:
    return False


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a release has heads of."""
  place, files = _files(Path(path).expanduser())
  if not files:
    raise ValueError(f"{path}: {_NOT_HERE}")
  heads = [(match, file) for match, file in files if match["module"] in ("heads", "heads_mvq")]
  there = {match["modality"] for match, _ in heads if match["modality"]}
  for match, file in heads:
    if not match["modality"]:
      there |= {name.split(".")[0] for name in open_weights(file)}
  return tuple(m for m in imagebind.MODALITIES if m != "video" and imagebind.official_name(m) in there)


def open_release(
  folder: str | Path, base: str | Path = "", postfix: str = "", *, needs_base: bool = True, trunk_of: str = ""
) -> Release:
  """Opens the files of a release; no array is read but those of adapters.

  Args:
    folder: with the release's files, or with `checkpoints`, a folder of them.
    base: the ImageBind checkpoint beneath; "" for `imagebind_huge.pth` (or `.safetensors`) in the folder or above.
    postfix: which of the saved states, such as "_best" or "_last"; "" for the best one that is there. Adapters that
      were saved only at another time are taken, and named in the log.
    needs_base: whether it is an error if there is no base.
    trunk_of: a modality of which encoder and heads alone are wanted: files of other ones are left shut; "" for all.

  Raises:
    ValueError: naming the folder or file, if the release or its base is missing, damaged or of an unknown kind.
  """
  folder = Path(folder).expanduser()
  place, files = _files(folder)
  if not files:
    raise ValueError(f"{folder}: {_NOT_HERE}")
  adapters = [(match, path) for match, path in files if match["module"] == "lora"]
  others = [(match, path) for match, path in files if match["module"] != "lora"]
  postfix = _chosen({match["postfix"] or "" for match, _ in others}, postfix, place)
  entries, books, sources = {}, None, []
  if base_file := _base(folder, place, base):
    below = imagebind.weights_of(base_file)
    entries |= below
    sources += below.files
  elif needs_base:
    raise ValueError(f"{folder}: needs the ImageBind checkpoint it was trained from; put imagebind_huge.pth beside it, "
                     "or give options.base")  # fmt: skip
  there = set()
  # New postprocessors come after the old ones, whose place they take.
  for match, path in sorted(others, key=lambda file: file[0]["module"] == "postprocessors_new"):
    if (match["postfix"] or "") != postfix or (trunk_of and not _of_trunk(match, trunk_of)):
      continue
    if match["module"] == "mvq_adapter":
      raise ValueError(f"{path}: a release with mvq_adapter is not supported")
    weights = open_weights(path, empty=True)
    sources += weights.files
    if match["module"] == "vector_quantise":
      books = weights
      continue
    named = _named(weights, match["module"], match["modality"])
    there |= {name.split(".")[1] for name in named if name.startswith(("modality_heads.", "modality_heads_mvq."))}
    entries |= named
  if trunk_of:
    books = books or Weights({}, (place,))
  elif books is None or not any(name.startswith("mvq_dict.") for name in books):
    raise ValueError(f"{place}: holds no codebooks of the kind mvq_dict.*.embedding "
                     f"(imagebind-vector_quantise-{postfix}.pth)")  # fmt: skip
  merged = Weights(entries, tuple(sources))
  adapted = []
  for m in sorted({match["modality"] for match, _ in adapters if match["modality"]}):
    if trunk_of and m != imagebind.official_name(trunk_of):
      continue
    path = _adapter(adapters, m, postfix)
    if base_file:
      merged = _with_adapters(merged, m, open_weights(path))
    adapted.append(ours(m))
  present = tuple(m for m in imagebind.MODALITIES if m != "video" and imagebind.official_name(m) in there)
  return Release(place, merged, books, present, tuple(adapted), _settings(folder, place))


def _of_trunk(match: re.Match[str], modality: str) -> bool:
  return (match["module"] not in ("decoder_trunk", "decoder_head", "vector_quantise")
          and match["modality"] in (None, imagebind.official_name(modality)))  # fmt: skip


def _chosen(there: set[str], postfix: str, place: Path) -> str:
  choices = [postfix] if postfix else [p for p in _POSTFIXES if p in there] or sorted(there)
  if choices[0] not in there or (not postfix and choices[0] not in _POSTFIXES and len(there) > 1):
    raise ValueError(f"{place}: postfix {postfix!r}: give one of those that are there: {', '.join(sorted(there))}")
  return choices[0]


def _base(folder: Path, place: Path, base: str | Path) -> Path | None:
  if base:
    return Path(base)
  names = ("imagebind_huge.pth", "imagebind_huge.safetensors")
  files = [where / name for where in (place, folder, folder.parent) for name in names]
  return next((file for file in files if present(file)), None)


def _named(weights: Weights, module: str, modality: str | None) -> Weights:
  """A file's arrays under ImageBind's names."""
  def name_of(name: str) -> str:
    m, rest = (modality, name) if modality else name.split(".", 1)
    if module == "postprocessors_new":
      return f"modality_postprocessors.{m}.1.{rest.rsplit('.', 1)[-1]}"
    return f"{_PREFIXES[module]}.{m}.{rest}"

  return weights.renamed(name_of)


def _adapter(files: list[tuple[re.Match[str], Path]], modality: str, postfix: str) -> Path:
  paths = {match["postfix"] or "": path for match, path in files if match["modality"] == modality}
  if postfix not in paths:
    choice = next((p for p in _POSTFIXES if p in paths), next(iter(paths)))
    logging.warning("%s: taken, as there are no adapters %r", paths[choice], postfix)
    return paths[choice]
  return paths[postfix]


def _with_adapters(weights: Weights, official: str, adapter: Weights) -> Weights:
  """The checkpoint with a trunk's adapters folded into its weights as these are read."""
  layers: dict[str, dict[str, Entry]] = collections.defaultdict(dict)
  try:
    from_release({name: np.zeros(entry.shape, np.int8) for name, entry in adapter.items()})  # refuses other names
  except ValueError as error:
    raise ValueError(f"{adapter.name}: {error}") from error
  for name, entry in adapter.items():
    layer, part = name.removeprefix("lora_model.").rsplit("_lora_", 1)
    whole = f"modality_trunks.{official}.{layer}{'_' if layer.endswith('in_proj') else '.'}weight"
    layers[whole][part] = dataclasses.replace(entry, read=functools.partial(_adapter_part, name, entry))
  entries = dict(weights)
  for name, pair in layers.items():
    shape, parts = entries[name].shape if name in entries else None, {k: e.shape for k, e in pair.items()}
    fits = shape and len(pair) == 2 and (parts["up"][0], parts["down"][1], parts["up"][1]) == (*shape, parts["down"][0])
    if not fits:
      raise ValueError(f"{adapter.name}: adapters {parts} do not fit {name} {shape}")
    entries[name] = dataclasses.replace(entries[name], read=functools.partial(_adapted, entries[name], pair), part=None)
  return Weights(entries, (*weights.files, *adapter.files))


def _adapter_part(name: str, entry: Entry) -> dict[str, Any]:
  """{"lora_a": array} or {"lora_b": array} of one of the release's arrays."""
  (path, value), = flatten_dict(from_release({name: entry.read()})).items()
  return {path[-1]: value}


def _adapted(entry: Entry, pair: Mapping[str, Entry]) -> np.ndarray:
  layer = {"kernel": entry.read().T} | pair["down"].read() | pair["up"].read()
  return np.asarray(merge({"layer": layer})["layer"]["kernel"]).T


def _settings(folder: Path, place: Path) -> Mapping[str, Any]:
  for where in dict.fromkeys((place, folder, place.parent)):
    path = where / "cfg_all_train.yaml"
    if path.is_file():
      note(path)
      try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
      except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable YAML ({error})") from error
      if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping is needed, got {type(content).__name__}")
      return content
  return {}


def make_trunk(
  *,
  weights: Place = "",
  modality: Name = "image",
  base: Place | Path = "",
  postfix: Line = "",
  heads: Count = 0,
  clips: Count = 0,
  crops: Crops = 3,
  focal_length: Camera = FOCAL_LENGTH,
  baseline: Camera = BASELINE,
  dtype: Dtype = "",
  remat: bool = False,
  scan: bool = False,
) -> Trunk:
  """An encoder of the release, adapters merged; its published head is the shared one, before quantisation.

  A text encoder with adapters attends to later tokens too, as the release's does, which was trained so.

  Args:
    weights: folder of the release.
    modality: one of `modalities`, or "video", which has the images' encoder.
    base, postfix: as in `open_release`.
    heads, clips, crops, focal_length, baseline, dtype, remat, scan: as in `imagebind.make_trunk`.

  Raises:
    ValueError: naming the folder or file, see `open_release`, or if the release lacks the modality.
  """
  modality = "image" if modality == "vision" else modality
  if not weights:
    raise ValueError("weights: got '', the folder of a CodeBind release is needed")
  source = "image" if modality == "video" else modality
  available = modalities(Path(weights))
  if source not in available:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(available)}")
  release = open_release(weights, base, postfix, trunk_of=source)
  imagebind.announce(str(release.folder), LICENCE)
  spec = release.encoder_spec(source, heads)
  item = item_input(modality, spec.size, spec.channels, clips=clips, crops=crops, focal_length=focal_length,
                    baseline=baseline)  # fmt: skip
  options = {"weights": weights, "modality": modality, "base": str(base), "postfix": postfix, "heads": heads,
             "clips": clips, "crops": crops, "focal_length": focal_length, "baseline": baseline, "dtype": dtype,
             "remat": remat, "scan": scan}  # fmt: skip
  module = Encoder(
    spec, drop_text_mask=source == "text" and "text" in release.adapted, remat=remat, scan=scan, dtype=dtype or None
  )
  return Trunk(
    name="codebind_release", modality=modality, module=module, input=item,
    fingerprint=fingerprint({}, {"weights": release.weights.hash(), "modality": modality, "heads": spec.heads,
                                 "dtype": dtype}, f"{_REVISION} {item.revision}"),
    load=functools.partial(release.encoder, modality=source), options=options, licence=LICENCE,
    head=PublishedHead(Head(release.shared_dim), lambda shapes: release.heads(source)["shared"],
                       release.logit_scale(source)),
  )  # fmt: skip
