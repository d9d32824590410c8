"""A trained or published model in Python: `load(SOURCE).embed({"image": [...], "text": [...]})`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Shaped

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.evaluators.zeroshot import class_embeddings
from codebind_jax.methods.base import Method
from codebind_jax.norm import unit
from codebind_jax.runtime import checkpoint
from codebind_jax.saving import folder as saved_folder
from codebind_jax.saving import hub
from codebind_jax.step import make_embed_step
from codebind_jax.trunks import codebind_release, load_trunk
from codebind_jax.trunks.base import fingerprint
from codebind_jax.trunks.families import families, family_of

# Axes of one item as an array, 1 where not named.
_AXES = {"image": 3, "tactile": 3, "video": 4, "depth": 2, "thermal": 2, "points": 2, "eeg": 2, "imu": 2}
_TRUNK_ROWS = 32  # items of a trunk's batch, a device


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Embeddings of N items of one modality (their class token), each part L2-normalised.

  Attributes:
    shared: [N, d_s], comparable with every other modality by cosine.
    specific: [N, d_p], the modality-specific part; width 0 for text.
    full: [N, d_s + d_p], both parts together.
    codes_shared: [N, S_s] index of each segment's code in the shared codebook.
    codes_specific: [N, S_p] likewise in the modality's own codebook.
  """

  shared: Float[np.ndarray, "n ds"]
  specific: Float[np.ndarray, "n dp"]
  full: Float[np.ndarray, "n d"]
  codes_shared: Int[np.ndarray, "n ss"]
  codes_specific: Int[np.ndarray, "n sp"]

  @property
  def codes(self) -> Int[np.ndarray, "n s"]:
    """All codes of an item: the shared ones, then the specific ones."""
    return np.concatenate([self.codes_shared, self.codes_specific], axis=1)

  def asdict(self) -> dict[str, np.ndarray]:
    """Name of a field -> array, as the evaluators take them."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Model:
  """A trained model: trunks, heads and codebooks.

  Args:
    config: of the training run (`Config`, ConfigDict or dict).
    params: head parameters.
    codebooks: name -> CodebookState.
    trunks: modality -> Trunk; those not given are loaded at first use.
    batch: rows embedded at once; smaller inputs are padded to a power of two.
    modalities: the trained ones; all of the config's unless given.
  """

  def __init__(
    self, config: Any, params: Any, codebooks: Any, trunks: dict | None = None, batch: int = 256,
    modalities: Sequence[str] | None = None,
  ):
    self.config = config_lib.read(config)
    self.params, self.codebooks, self.trunks, self.batch = params, codebooks, dict(trunks or {}), batch
    self.method = config_lib.method_of(self.config)
    self._towers = self.config.model.towers
    self._embed = _embed_step(self.method)
    self._weights: dict[str, Any] = {}  # modality -> its trunk's parameters on the devices
    self._mesh: jax.sharding.Mesh | None = None
    self._modalities = tuple(sorted(self.config.model.towers if modalities is None else modalities))

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that the model can embed, sorted."""
    return self._modalities

  @property
  def trunk_rows(self) -> int:
    """Items of a trunk's batch, over all devices."""
    return _TRUNK_ROWS * self._devices

  def on(self, devices: Sequence[jax.Device]) -> Model:
    """This model with its arrays replicated over `devices`, and all batches split over them."""
    moved = copy.copy(self)
    moved._weights = {}
    moved._mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    moved.params, moved.codebooks = moved._placed((self.params, self.codebooks))
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
    shape, dtype = self._item(modality)
    token = jax.ShapeDtypeStruct((1, *shape), dtype)
    out = jax.eval_shape(self._embed, self.params, self.codebooks, {modality: token})[modality]
    return {name: column.shape[-1] for name, column in zip(_FIELDS, _columns(out))}

  def _item(self, modality: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of one item as the tower takes it: the class token, or a prepared item."""
    trunk = self.trunk(modality)
    if self._towers[modality].cache:
      return (self.tokens_seen(modality) or trunk.num_tokens, trunk.width), "float32"
    return trunk.input.shape, trunk.input.dtype

  def trunk(self, modality: str) -> Any:
    """The trunk of a modality; its first use fetches and loads it."""
    if modality not in self.trunks:
      tower = self.config.model.towers[modality]
      self.trunks[modality] = load_trunk(tower.trunk, **tower.options)
    return self.trunks[modality]

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
    return {m: self.embed_tokens(m, self.tokens(m, items)) for m, items in inputs.items()}

  def tokens(self, modality: str, items: Any) -> Shaped[np.ndarray, "n ..."]:
    """Raw items as the tower takes them: trunk tokens, float32 [N, T, C], or prepared items [N, *shape]."""
    tokens = []
    for start in range(0, len(items), self.trunk_rows):
      prepared = []
      for number, item in enumerate(items[start : start + self.trunk_rows], start):
        try:
          prepared.append(self.prepare(modality, item))
        except ValueError as error:
          raise ValueError(f"{modality}[{number}]: {error}") from error
      tokens.append(self.trunk_tokens(modality, prepared))
    shape, dtype = self._item(modality)
    return np.concatenate(tokens) if tokens else np.zeros((0, *shape), dtype)

  def prepare(self, modality: str, item: Any) -> np.ndarray:
    """One raw item preprocessed for the trunk, on the host; safe in several threads once the trunk is loaded.

    Raises:
      ValueError: if it cannot be read.
    """
    try:
      return self.trunk(modality).preprocess(self._opened(modality, item))
    except OSError as error:
      raise ValueError(str(error)) from error

  def _opened(self, modality: str, item: Any) -> Any:
    """The item read as its trunk reads it if it is a path or a file's bytes; text and arrays unchanged."""
    if modality == "text" or not isinstance(item, str | bytes | pathlib.Path):
      return item
    return self.trunk(modality).read(item)

  def trunk_tokens(self, modality: str, prepared: Sequence[np.ndarray]) -> Shaped[np.ndarray, "n ..."]:
    """Trunk tokens of at most `trunk_rows` prepared items; the items themselves where the trunk runs in the model."""
    if not self._towers[modality].cache:
      return np.stack(list(prepared))
    trunk, rows = self.trunk(modality), len(prepared)
    if modality not in self._weights:
      self._weights[modality] = self._placed(trunk.params)
    padded = [*prepared, *[prepared[-1]] * (self._padded(rows, self.trunk_rows) - rows)]
    return np.asarray(trunk.compiled(self._weights[modality], self._split(trunk.collate(padded))))[:rows]

  def embed_prepared(self, modality: str, prepared: Sequence[np.ndarray]) -> Embeddings:
    """Embeds prepared items, keeping in memory only those tokens that the heads use."""
    parts = (prepared[i : i + self.trunk_rows] for i in range(0, len(prepared), self.trunk_rows))
    seen = self.tokens_seen(modality)
    return self.embed_tokens(modality, np.concatenate([self.trunk_tokens(modality, part)[:, :seen] for part in parts]))

  def tokens_seen(self, modality: str) -> int | None:
    """Number of cached tokens on which an embedding depends: 1, the class token; None for a trunk in the model."""
    return 1 if self._towers[modality].cache else None

  def embed_tokens(self, modality: str, tokens: Shaped[np.ndarray, "n ..."]) -> Embeddings:
    """Embeds precomputed trunk tokens, of which only the first `tokens_seen` are used, or prepared items."""
    if not len(tokens):
      raise ValueError(f"{modality}: nothing to embed, got 0 items")
    parts = []
    batch = self.batch if self._towers[modality].cache else min(self.batch, self.trunk_rows)
    for start in range(0, len(tokens), batch):
      chunk = np.asarray(tokens[start : start + batch])
      if self._towers[modality].cache:
        chunk = chunk[:, : self.tokens_seen(modality)].astype(np.float32)
      rows = len(chunk)
      # The last of several chunks is padded to the others' shape, so that one program serves all.
      padded = self._padded(batch if start else rows, batch)
      chunk = np.pad(chunk, [(0, padded - rows)] + [(0, 0)] * (chunk.ndim - 1))
      out = self._embed(self.params, self.codebooks, {modality: self._split(chunk)})[modality]
      parts.append([np.asarray(column)[:rows, 0] for column in _columns(out)])
    return Embeddings(*(np.concatenate(columns) for columns in zip(*parts)))

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
    weights = dict(weights or {})
    for name, weight in weights.items():
      if name not in inputs or isinstance(weight, bool) or not np.isscalar(weight) or not np.isfinite(weight):
        raise ValueError(f"weights: got {weight!r} for {name!r}; allowed: a number for {', '.join(inputs)}")
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
    """
    self._check({modality: items, "text": labels})
    self._check_list("text", labels, "labels")
    templates = tuple(templates) or self.config.data.eval_templates
    classes = class_embeddings(lambda texts: self.embed({"text": list(texts)})["text"].shared, list(labels), templates)
    scores = self.embed({modality: items})[modality].shared @ classes.T
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[(labels[k], float(scores[row, k])) for k in ranking] for row, ranking in enumerate(order)]

  @property
  def _devices(self) -> int:
    return self._mesh.size if self._mesh else 1

  def _placed(self, tree: Any) -> Any:
    """The arrays, replicated over the devices of `on` if there are any."""
    return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec())) if self._mesh else tree

  def _split(self, batch: Any) -> Any:
    """The batch, its rows split over the devices of `on` if there are any."""
    return jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec("rows"))) if self._mesh else batch

  def _padded(self, rows: int, batch: int) -> int:
    """Padded number of rows: the next power of two, at most `batch`, rounded up to a multiple of the devices."""
    return -(-min(batch, 1 << max(rows - 1, 0).bit_length()) // self._devices) * self._devices

  def _check(self, inputs: Mapping[str, Any]) -> None:
    for name in inputs:
      if name not in self.modalities:
        raise ValueError(f"modality {name!r} is not in this model; it has {list(self.modalities)}")

  def _check_list(self, modality: str, items: Any, name: str = "") -> None:
    """Refuses what is no list of items: a text would be taken as its letters, a picture as its rows."""
    name, got = name or modality, f"one {type(items).__name__}"
    if isinstance(items, np.ndarray | jax.Array):
      axes = 0 if modality == "text" else 1 if self._towers[modality].trunk == "vectors" else _AXES.get(modality, 1)
      one, got = items.ndim <= axes, f"an array of shape {items.shape}"
      one |= modality == "audio" and items.ndim == 2 and items.shape[1] <= 8  # a recording's channels
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
  return out.shared, out.specific, out.full, out.indices_shared, out.indices_specific


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


def _chosen(wanted: Sequence[str] | None, there: Sequence[str], where: files.Path) -> tuple[str, ...]:
  """The modalities to load, each of which must be there."""
  lacking = [name for name in wanted or () if name not in there]
  if lacking:
    raise ValueError(f"{where}: has no modality {lacking[0]!r}; it has {', '.join(there)}")
  return tuple(there if wanted is None else wanted)


def _of_run(folder: files.Path, modalities: Sequence[str] | None) -> Model:
  store = checkpoint.Checkpoints(folder)
  try:
    meta, arrays = store.read_meta(), store.read_arrays()
    config, position = meta["config"], meta["position"]
  finally:
    store.close()
  config = config_lib.read(config)
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

  Raises:
    ValueError: if its codebooks' codes differ in width.
  """
  sizes, codebooks = release.sizes(), release.codebooks()
  if len(set(sizes.code_dims.values())) != 1:
    raise ValueError(f"{release.folder}: its codes have different widths, {dict(sizes.code_dims)}; allowed: one width")
  for name, tower in config["model"]["towers"].items():
    tower["specific_dim"] = sizes.specific_dims[name]
    params[name] |= {key: value for key, value in release.heads(name).items() if key == "specific"}
  config["model"]["quantize"] = True
  codes = {name: count for name, count in sizes.codes.items() if name in config["model"]["towers"]}
  config["codebook"] = {
    "dim": next(iter(sizes.code_dims.values())), "shared_codes": sizes.codes["shared"], "codes": codes,
    "distance": sizes.distance, "normalize": sizes.normalize, "layout": sizes.layout,
  }  # fmt: skip
  return config, params, {name: codebooks[name] for name in ("shared", *codes)}
