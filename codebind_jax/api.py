"""A trained or published model in Python: `load(SOURCE).embed({"image": [...], "text": [...]})`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import numbers
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.config import Config
from codebind_jax.data.ahead import ahead
from codebind_jax.data.batches import Once
from codebind_jax.data.examples import Feed, Items, Tokens, Values
from codebind_jax.evaluators.zeroshot import class_embeddings
from codebind_jax.methods.base import Method
from codebind_jax.norm import unit
from codebind_jax.runtime import checkpoint, signals
from codebind_jax.runtime.sharding import Layout, MeshShape, Sharding, make_layout
from codebind_jax.saving import folder as saved_folder
from codebind_jax.saving import hub
from codebind_jax.step import make_embed_step
from codebind_jax.trunks import codebind_release, load_trunk
from codebind_jax.trunks.base import fingerprint
from codebind_jax.trunks.families import families, family_of

# Axes of one item as an array, 1 where not named.
_AXES = {"image": 3, "tactile": 3, "video": 4, "depth": 2, "thermal": 2, "points": 2, "eeg": 2, "imu": 2}
_EQUAL = 1e-5  # embeddings that differ by less in every value are one
_MANY = 16  # batches for each worker process, from which on they are started
_TRUNK_ROWS = 32  # items of a batch that a trunk encodes, a device
_LARGEST_WEIGHT = 1e30  # of `combine`, whose sums are float32


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Embeddings of N items of one modality (their class token), each part L2-normalised.

  Attributes:
    shared: [N, d_s], comparable with every other modality by cosine.
    specific: [N, d_p], the modality-specific part; width 0 for text.
    full: [N, d_s + d_p], both parts together.
    codes_shared: [N, S_s] index of each segment's code in the shared codebook.
    codes_specific: [N, S_p] likewise in the modality's own codebook.
    query: [N, d_s], the shared part before quantisation, in the space of `shared`: what a search for coded items
      compares with their `shared`. The same as `shared` where nothing is quantised.
  """

  shared: Float[np.ndarray, "n ds"]
  specific: Float[np.ndarray, "n dp"]
  full: Float[np.ndarray, "n d"]
  codes_shared: Int[np.ndarray, "n ss"]
  codes_specific: Int[np.ndarray, "n sp"]
  query: Float[np.ndarray, "n ds"]

  @property
  def codes(self) -> Int[np.ndarray, "n s"]:
    """All codes of an item: the shared ones, then the specific ones."""
    return np.concatenate([self.codes_shared, self.codes_specific], axis=1)

  def asdict(self) -> dict[str, np.ndarray]:
    """Name of a field -> array, as the evaluators take them."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Embedded:
  """What was embedded of some rows.

  Attributes:
    embeddings: of the rows that could be read, in order.
    good: which rows these are.
    bad: (number of the row, message) of those that this process could not read.
    content: of the rows that could be read, numbers that are equal where contents are; None unless asked for.
  """

  embeddings: Embeddings
  good: Bool[np.ndarray, "n"]
  bad: tuple[tuple[int, str], ...]
  content: Int[np.ndarray, "m"] | None = None


class Model:
  """A trained model: trunks, heads and codebooks, on one device or many.

  Args:
    config: of the training run (`Config`, ConfigDict or dict).
    params: head parameters.
    codebooks: name -> CodebookState.
    trunks: modality -> Trunk; those not given are loaded at first use.
    batch: rows embedded at once, on each device; smaller inputs are padded to a power of two.
    modalities: the trained ones; all of the config's unless given.
    layout: devices, on which `params` and `codebooks` lie; None for the first one of this process. If it has devices of
      several processes, all must embed the same rows.
  """

  def __init__(
    self, config: Any, params: Any, codebooks: Any, trunks: dict | None = None, batch: int = 256,
    modalities: Sequence[str] | None = None, layout: Layout | None = None,
  ):
    self.config = config_lib.read(config)
    self.params, self.codebooks, self.trunks, self.batch = params, codebooks, dict(trunks or {}), batch
    self.method = config_lib.method_of(self.config)
    self._towers, self._layout = self.config.model.towers, layout
    self._streamed: dict[str, tuple[Method, Any]] = {}  # modality -> method and parameters with its trunk in the model
    self._modalities = tuple(sorted(self.config.model.towers if modalities is None else modalities))

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that the model can embed, sorted."""
    return self._modalities

  def on(self, devices: Sequence[jax.Device]) -> Model:
    """This model with its arrays replicated over devices, and all batches split over them.

    If they are devices of several processes, all of these must call this, and embed the same rows.
    """
    moved = copy.copy(self)
    moved._layout, moved._streamed = make_layout(MeshShape(), Sharding(), devices), {}
    moved.params, moved.codebooks = jax.device_put((self.params, self.codebooks), moved._layout.replicated)
    return moved

  def fingerprint(self, modalities: Sequence[str]) -> str:
    """Hex SHA-256 of all that decides the embeddings of `modalities`: weights, codebooks, trunks and their options."""
    plain = schema.to_plain(self.config)
    recipe = {key: plain.get(key) for key in ("method", "method_options", "model", "codebook")}
    for tower in recipe["model"]["towers"].values():
      tower.pop("options")  # with paths; the trunk's fingerprint has what they mean
    recipe |= {"trunks": {m: self.trunk(m).fingerprint for m in modalities}}
    return fingerprint((self.params, self.codebooks), recipe, "model-1")

  def widths(self, modality: str) -> dict[str, int]:
    """Field of `Embeddings` -> its width, from shapes alone."""
    method, params = self._with_trunk(modality)
    item = self.trunk(modality).input
    one = jax.ShapeDtypeStruct((1, *item.shape), item.dtype)
    out = jax.eval_shape(_embed_step(method), params, self.codebooks, {modality: one})[modality]
    return {name: column.shape[-1] for name, column in zip(_FIELDS, _columns(out))}

  def trunk(self, modality: str) -> Any:
    """The trunk of a modality; its first use fetches and loads it."""
    if modality not in self.trunks:
      tower = self.config.model.towers[modality]
      self.trunks[modality] = load_trunk(tower.trunk, **tower.options)
    return self.trunks[modality]

  def _with_trunk(self, modality: str) -> tuple[Method, Any]:
    """Method and parameters whose tower of a modality takes prepared items."""
    tower = self._towers[modality]
    if not tower.cache:
      return self.method, self.params
    if modality not in self._streamed:
      towers = dict(self._towers) | {modality: dataclasses.replace(tower, cache=False)}
      model = dataclasses.replace(self.config.model, towers=schema.Frozen(towers))
      trunk = self.trunk(modality)
      method = config_lib.method_of(dataclasses.replace(self.config, model=model), {**self.trunks, modality: trunk})
      weights = jax.device_put(trunk.params, self._layout.replicated) if self._layout else trunk.params
      self._streamed[modality] = method, self.params | {modality: self.params.get(modality, {}) | {"trunk": weights}}
    return self._streamed[modality]

  def embed(self, inputs: Mapping[str, Any]) -> dict[str, Embeddings]:
    """Embeds items of any subset of the modalities.

    Args:
      inputs: modality -> a list of items: strings for text; paths, a file's bytes or arrays for the others (image: PIL
        images and uint8 [h, w, 3] as well). An array of one axis more is a batch of items.

    Returns:
      modality -> Embeddings, rows in the order given.

    Raises:
      ValueError: naming the modality the model lacks and those it has, the item that cannot be read, or what stands
        where a list is needed: one item, or nothing.
    """
    self._check(inputs)
    for modality, items in inputs.items():
      self._check_list(modality, items)
    out = {}
    for modality, items in inputs.items():
      values = list(np.asarray(items) if isinstance(items, jax.Array) else items)
      found = self.embed_rows(modality, Values(values, modality, self.trunk(modality).input), range(len(values)))
      if found.bad:
        raise ValueError(found.bad[0][1])
      out[modality] = found.embeddings
    return out

  def embed_rows(
    self, modality: str, feed: Feed, rows: Int[np.ndarray, "n"] | range, *, workers: int = 0, threads: int = 2,
    batch: int = 0, content: bool = False,
  ) -> Embedded:  # fmt: skip
    """Embeds rows of a feed, in order; what cannot be read is left out.

    Args:
      modality: of the feed.
      feed: cached tokens, or items that the trunk takes.
      rows: numbers of the rows.
      workers: processes that read and prepare where there is much to do; 0 for threads of this one.
      threads: reading threads of each process.
      batch: rows at once, on each device; 0 for the model's.
      content: also tells which rows of a feed of `Items` have one content, from what is read anyway.

    Raises:
      ValueError: if there are no rows.
    """
    if not len(rows):
      raise ValueError(f"{modality}: nothing to embed, got 0 items")
    raw = not isinstance(feed, Tokens)
    method, params = self._with_trunk(modality) if raw else (self.method, self.params)
    layout, columns, good, bad, hashes = self._layout, [], [], [], []
    hashed = content and isinstance(feed, Items)
    process, processes = layout.process if layout else (0, 1)
    size = (batch or (min(self.batch, _TRUNK_ROWS) if raw else self.batch)) * (layout.row_devices if layout else 1)
    if len(rows) < size:  # a power of two, so that few programs are compiled
      devices = layout.row_devices if layout else 1
      size = -(-(1 << (len(rows) - 1).bit_length()) // devices) * devices
    parts = Once(feed, rows, size, process, processes, hashed)
    collate = self.trunk(modality).collate if raw and processes == 1 else np.asarray
    workers = workers if raw and len(parts) >= _MANY * workers else 0  # that take seconds to start
    for part in ahead(parts, workers=workers, threads=threads, stop=len(parts), parts=True):
      signals.check()
      items, there = collate(list(part.items)), part.good
      halves = part.content if hashed else np.zeros((len(there), 2), np.int32)
      if layout:
        items, there, halves = layout.put_batch((items, there, halves))
      out = _embed_step(method)(params, self.codebooks, {modality: items})[modality]
      found = (*(column[:, 0] for column in _columns(out)), there, halves)
      *values, there, halves = found if processes == 1 else layout.gathered(found)
      there = np.asarray(there)
      hashes.append(np.ascontiguousarray(np.asarray(halves)[there]).view(np.int64)[:, 0])
      columns.append([np.asarray(value)[there] for value in values])
      good.append(there)
      bad.extend(part.bad)
    whole = Embeddings(*(np.concatenate(column) for column in zip(*columns)))
    good = np.concatenate(good)[: len(rows)]
    return Embedded(whole, good, tuple(bad), np.concatenate(hashes) if hashed else None)

  def combine(
    self, inputs: Mapping[str, Any], weights: Mapping[str, Any] | None = None
  ) -> Float[np.ndarray, "n ds"]:
    """One vector for items seen in several modalities: the weighted sum of their shared embeddings, at unit length.

    Args:
      inputs: modality -> a list of n items as `embed` takes them, or their `Embeddings`.
      weights: modality -> factor; 1 where not named. A negative one takes a modality away.

    Raises:
      ValueError: as `embed`; for lists of different lengths, weights of other modalities or that are no finite numbers,
        or a sum of zero, which has no direction.
    """
    if not isinstance(inputs, Mapping) or not inputs:
      raise ValueError(f"combine: got {inputs!r:.60}; needed: modality -> a list of items, for one modality or more")
    self._check(inputs)
    if weights is not None and not isinstance(weights, Mapping):
      raise ValueError(f"weights: got {weights!r:.60}; needed: modality -> a number")
    weights = dict(weights or {})
    for name, weight in weights.items():
      number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
      if name not in inputs or not number or not abs(weight) < _LARGEST_WEIGHT:
        raise ValueError(f"weights: got {weight!r:.60} for {name!r}; allowed: a number for {', '.join(inputs)}")
    raw = {m: items for m, items in inputs.items() if not isinstance(items, Embeddings)}
    for modality, items in raw.items():
      self._check_list(modality, items)
    lengths = {m: len(x.shared if isinstance(x, Embeddings) else x) for m, x in inputs.items()}
    if len(set(lengths.values())) > 1:
      raise ValueError(f"combine: lists of different lengths, {lengths}")
    embedded = {**inputs, **self.embed(raw)} if raw else inputs
    total = sum(np.float32(weights.get(m, 1.0)) * x.shared for m, x in embedded.items())
    lost = np.flatnonzero(np.linalg.norm(total, axis=1) < 1e-6)
    if len(lost):
      raise ValueError(f"combine: the weighted embeddings of item {lost[0]} add up to zero, which has no direction")
    return np.asarray(unit(total), np.float32)

  def save(self, folder: str | files.Path, *, trunks: str = "include") -> files.Path:
    """Writes the model to a folder that `load` reads: safetensors, config.json, a model card; LoRA is merged.

    The folder appears whole or not at all.

    Args:
      folder: new or empty, or one that holds a saved model, which is replaced; local, gs:// or s3://.
      trunks: "include" writes all trunks' values, so that the folder needs nothing else. "reference" leaves out those
        that are as in their checkpoint, and names it and its SHA-256, which `load` compares.

    Returns:
      the folder.

    Raises:
      ValueError: for another value of `trunks`, or a folder that holds something else.
    """
    return saved_folder.write(self, folder, trunks)

  def push_to_hub(self, name: str, *, private: bool = False) -> str:
    """Saves the model with its trunks, and uploads it as the model `name` of the Hugging Face hub (extra `hub`).

    Args:
      name: "org/name"; created where it is not there.
      private: of a model that is created.

    Returns:
      the commit's address.

    Raises:
      ValueError: if huggingface_hub is not installed, or the hub refuses or cannot be reached.
    """
    hub.library()
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch) / "model"
      return hub.push(saved_folder.write(self, folder, card_name=f"{hub.PREFIX}{name}"), name, private)

  def classify(
    self, items: Any, labels: Sequence[str], *, modality: str = "image", templates: Sequence[str] = ()
  ) -> list[list[tuple[str, float]]]:
    """Zero-shot classification against class names.

    Args:
      items: what to classify.
      labels: class names.
      modality: of the items.
      templates: prompt templates with one `{}`; default the config's.

    Returns:
      Per item (label, cosine), best first.

    Raises:
      ValueError: as `embed`; for one text where a list of labels or templates is needed, or two labels that have one
        embedding, such as "cow" and "Cow ".
    """
    if not isinstance(modality, str):
      raise ValueError(f"modality: got {modality!r:.60}; allowed: one of {list(self.modalities)}")
    self._check({modality: items, "text": labels})
    self._check_list(modality, items)
    self._check_list("text", labels, "labels")
    if isinstance(templates, str) or not isinstance(templates, Sequence):
      raise ValueError(f"templates: got {templates!r:.60}; a list of templates is needed, [template] for one")
    templates = tuple(templates) or self.config.data.eval_templates
    classes = class_embeddings(lambda texts: self.embed({"text": list(texts)})["text"].shared, list(labels), templates)
    for k in range(1, len(classes)):
      equal = np.abs(classes[:k] - classes[k]).max(axis=1) <= _EQUAL
      if equal.any():
        first = labels[int(np.argmax(equal))]
        raise ValueError(f"labels: {first!r} and {labels[k]!r} have one embedding; leave one of them out")
    scores = self.embed({modality: items})[modality].shared @ classes.T
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[(labels[k], float(scores[row, k])) for k in ranking] for row, ranking in enumerate(order)]

  def _check(self, inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
      raise ValueError(f"got {inputs!r:.60}; needed: modality -> a list of items, such as {{'text': ['a cow']}}")
    for name in inputs:
      if name not in self.modalities:
        raise ValueError(f"modality {name!r} is not in this model; it has {list(self.modalities)}")

  def _check_list(self, modality: str, items: Any, name: str = "") -> None:
    """Refuses what is no list of items: a text would be taken as its letters, a picture as its rows."""
    name, got = name or modality, f"one {type(items).__name__}"
    if isinstance(items, np.ndarray | jax.Array):
      vectors, words = self._towers[modality].trunk == "vectors", items.dtype.kind in "OSUT"  # paths, texts
      axes = 0 if modality == "text" or words else 1 if vectors else _AXES.get(modality, 1)
      one, got = items.ndim <= axes, f"an array of shape {items.shape}"
      if not vectors and not words:  # a recording's channels; a picture's
        one |= modality == "audio" and items.ndim == 2 and items.shape[1] <= 32
        one |= modality in ("depth", "thermal") and items.ndim == 3 and items.shape[2] in (1, 3, 4)
    else:
      one = not isinstance(items, Sequence) or isinstance(items, str | bytes | bytearray | memoryview)
      got = f"{items!r:.60}" if isinstance(items, str | pathlib.Path) else got
    if one:
      raise ValueError(f"{name}: got {got}; a list of items is needed, [item] for one")
    if not len(items):
      raise ValueError(f"{name}: nothing to embed, got 0 items")


@functools.lru_cache(maxsize=8)
def _embed_step(method: Method) -> Any:
  """The jitted embedding step, shared by all models of equal methods and towers."""
  return jax.jit(make_embed_step(method))


_FIELDS = tuple(field.name for field in dataclasses.fields(Embeddings))


def _columns(out: Any) -> tuple[Any, ...]:
  """The arrays of a modality's outputs in the order of `Embeddings`' fields."""
  return out.shared, out.specific, out.full, out.indices_shared, out.indices_specific, out.query


def load(source: str | files.Path, *, modalities: Sequence[str] | None = None, **options: Any) -> Model:
  """Loads a trained model, or a published checkpoint.

  Args:
    source: the workdir of a training run, a folder that `Model.save` wrote, a file or folder of a family that
      `list_pretrained` names, any of these under gs:// or s3:// (extras `gcs`, `s3`), or "hf:org/name[@revision]" for
      one of these on the Hugging Face hub (extra `hub`). A far run's arrays are read where they are; of other far
      files a copy is kept, see `files.fetched`.
    modalities: those to load; all that the source has unless given.
    **options: of a published family's `make_trunk`, such as `dtype="bfloat16"` or the `base` of a CodeBind release.

  Raises:
    ValueError: if there is no such path, it is no supported checkpoint, is damaged, or lacks a modality; if the hub
      lacks the model, or the hub or a far disk cannot be reached.
  """
  if not isinstance(source, str | os.PathLike) or not str(source):
    raise ValueError(f"source: got {source!r:.60}; needed: a path, or hf:org/name")
  if isinstance(modalities, str):
    raise ValueError(f"modalities: got {modalities!r}; a list of names is needed, [{modalities!r}] for one")
  if str(source).startswith(hub.PREFIX):
    source = hub.fetch(str(source))
  path = files.path(source)
  files.probe(path)
  if not files.exists(path):
    raise ValueError(f"{str(source)!r}: no such file or folder")
  is_run = files.is_folder(path / checkpoint.FOLDER)
  if (is_run or saved_folder.is_saved(path)) and options:
    raise ValueError(f"{path}: has its own options; {next(iter(options))!r} is for published checkpoints")
  if is_run:
    return _of_run(path, modalities)
  local = files.fetched(path)
  try:
    if saved_folder.is_saved(local):
      parts = saved_folder.read(local, modalities)
      return Model(parts.config, parts.params, parts.codebooks, parts.trunks, modalities=parts.modalities)
    return _published(local, modalities, options)
  except ValueError as error:
    if local == path:
      raise
    raise ValueError(str(error).replace(str(local), str(path))) from error


def config_of(source: str | files.Path) -> Config:
  """The config of a model that `load` takes, with the towers that it has; of a run its arrays are not read.

  Raises:
    ValueError: as `load`.
  """
  path = files.path(hub.fetch(str(source)) if str(source).startswith(hub.PREFIX) else source)
  files.probe(path)
  if not files.is_folder(path / checkpoint.FOLDER):
    return load(path).config
  config, position = _meta_of(path)
  towers = schema.Frozen({m: tower for m, tower in config.model.towers.items() if m in position["trained"]})
  return dataclasses.replace(config, model=dataclasses.replace(config.model, towers=towers))


def _meta_of(folder: files.Path) -> tuple[Config, Mapping[str, Any]]:
  """(config, position) of a run's newest checkpoint."""
  meta = _read(folder, checkpoint.SavedRun.read_meta)
  return config_lib.read_saved(meta["config"]), meta["position"]


def _read(folder: files.Path, read: Callable[[checkpoint.SavedRun], Any]) -> Any:
  """What `read` gives of a run's checkpoints.

  Raises:
    ValueError: if there is none.
  """
  try:
    with contextlib.closing(checkpoint.SavedRun(folder)) as run:
      return read(run)
  except FileNotFoundError as error:
    raise ValueError(f"{folder}: a run without a checkpoint, its training has saved no step ({error})") from error


def _chosen(wanted: Sequence[str] | None, there: Sequence[str], where: files.Path) -> tuple[str, ...]:
  """The modalities to load, each of which must be there."""
  lacking = [name for name in wanted or () if name not in there]
  if lacking:
    raise ValueError(f"{where}: has no modality {lacking[0]!r}; it has {', '.join(there)}")
  return tuple(there if wanted is None else wanted)


def _of_run(folder: files.Path, modalities: Sequence[str] | None) -> Model:
  meta, arrays = _read(folder, checkpoint.SavedRun.read)
  config, position = config_lib.read_saved(meta["config"]), meta["position"]
  codebooks = config_lib.method_of(config).restore(arrays["codebooks"])
  return Model(config, arrays["params"], codebooks, modalities=_chosen(modalities, position["trained"], folder))


def _published(path: pathlib.Path, modalities: Sequence[str] | None, options: Mapping[str, Any]) -> Model:
  """A model of a checkpoint's own embeddings: trunks and published heads; a CodeBind release brings all its parts."""
  family = family_of(path)
  chosen = _chosen(modalities, families()[family].modalities(path), path)
  own = {name: {"weights": str(path), "modality": name} | dict(options) for name in chosen}
  trunks = {name: load_trunk(family, **own[name]) for name in chosen}
  headless = [name for name, trunk in trunks.items() if trunk.head is None]
  if headless:
    raise ValueError(f"{path}: has no published embedding of {headless[0]!r}; use it as a trunk in a config")
  widths = {name: trunk.head.module.width for name, trunk in trunks.items()}
  if len(set(widths.values())) > 1:
    raise ValueError(f"{path}: its embeddings have different widths, {widths}; load some of them by `modalities`")
  towers = {
    name: {"trunk": family, "options": own[name], "cache": False, "head": "published",
           "logit_scale": trunk.head.logit_scale}
    for name, trunk in trunks.items()
  }  # fmt: skip
  config = {"model": {"towers": towers, "shared_dim": next(iter(widths.values())), "quantize": False}}
  params = {name: {"trunk": trunk.params, "shared": trunk.head_params} for name, trunk in trunks.items()}
  scales = {f"{name}_log_logit_scale": np.float32(np.log(trunk.head.logit_scale)) for name, trunk in trunks.items()}
  codebooks = {}
  if family == "codebind_release":
    release = codebind_release.open_release(path, **{k: v for k, v in options.items() if k in ("base", "postfix")})
    config, params, codebooks = _with_release(release, config, params)
  return Model(config, params | scales, codebooks, trunks)


def _with_release(release: codebind_release.Release, config: dict, params: dict) -> tuple[dict, dict, dict]:
  """(config, parameters, codebooks) of a published model with a release's specific heads and codebooks.
  """
  sizes, codebooks = release.sizes(), release.codebooks()
  for name, tower in config["model"]["towers"].items():
    tower["specific_dim"] = sizes.specific_dims[name]
    params[name] |= {key: value for key, value in release.heads(name).items() if key == "specific"}
  config["model"]["quantize"] = True
  codes = {name: count for name, count in sizes.codes.items() if name in config["model"]["towers"]}
  config["codebook"] = {
    "dim": sizes.code_dims["shared"], "dims": {name: sizes.code_dims[name] for name in codes},
    "shared_codes": sizes.codes["shared"], "codes": codes,
    "distance": sizes.distance, "normalize": sizes.normalize, "layout": sizes.layout,
  }  # fmt: skip
  return config, params, {name: codebooks[name] for name in ("shared", *codes)}
