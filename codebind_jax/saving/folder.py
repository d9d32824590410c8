"""A model as a folder that loads by itself: weights, config, and what its trunks need to be made; no pickle.

`config.json` has the method, towers and codebooks, and for each trunk where its values are. `model.safetensors` has all
arrays: `params/...`, `codebooks/...`, and `trunks/MODALITY/...` of trunks outside the model, whose tokens are cached.
`trunks/MODALITY/` has the small files that a trunk is made of (tokenizer, preparation, sizes), and the shapes of its
checkpoint (`checkpoint_files.write_shapes`). `README.md` is a model card.

`config.json` carries a checksum of itself, of each array and of each of the small files. What is read is verified: of
some modalities their arrays and files alone. The card is read by no program, and may be edited.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.methods.base import make_init
from codebind_jax.models import lora
from codebind_jax.saving import hub
from codebind_jax.saving.card import card
from codebind_jax.schema import keys_of
from codebind_jax.trunks import input_shapes, load_trunk, trunk_maker
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.checkpoint_files import Weights, noted, open_weights, present, write_safetensors, write_shapes

MODEL_TYPE = "codebind_jax"
FORMAT = 1
CONFIG, ARRAYS, CARD, TRUNKS = "config.json", "model.safetensors", "README.md", "trunks"
MODES = ("include", "reference")
# Files of a published folder that families read beside the weights.
_SMALL = (
  "config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
  "video_preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
_PATHS = ("weights", "base", "tokenizer")  # options that are paths, beside those whose type says so
_OF_TEXT = frozenset(_SMALL) - {name for name in _SMALL if "config.json" in name and "token" not in name}


@dataclasses.dataclass(frozen=True)
class Saved:
  """What `read` gives: the parts of a model."""

  config: config_lib.Config
  params: dict[str, Any]
  codebooks: dict[str, Any]
  trunks: dict[str, Trunk]
  modalities: tuple[str, ...]


def is_saved(path: files.Path) -> bool:
  """Whether a folder is one that `write` made; also one whose config is damaged, which `read` says."""
  text = ""
  try:
    text = files.read_text(path / CONFIG)
    return json.loads(text).get("model_type") == MODEL_TYPE
  except OSError as error:
    if files.is_far(path) and not isinstance(error, FileNotFoundError):
      raise  # of the far disk; what is there is not known
    return False
  except (ValueError, AttributeError, RecursionError):
    return f'"model_type": "{MODEL_TYPE}"' in text


def write(model: Any, folder: str | files.Path, trunks: str = "include", card_name: str = "") -> files.Path:
  """Writes an `api.Model` to a folder, whole or not at all; adapters are merged into their trunks.

  Args:
    model: the model.
    folder: a new or empty folder, or one that holds a saved model, which is replaced.
    trunks: "include" writes the values of all trunks. "reference" names the checkpoint, and its hash, of those trunks
      whose values are still the checkpoint's.
    card_name: by which the model card loads the model; "" for the folder's name.

  Returns:
    the folder.

  Raises:
    ValueError: for another value of `trunks`, a folder that holds something else, a trunk that has no checkpoint to
      refer to, or a far disk that cannot be used.
  """
  if trunks not in MODES:
    raise ValueError(f"trunks: got {trunks!r}; allowed: {', '.join(MODES)}")
  folder = files.path(folder)
  files.probe(folder, write=True)
  _refuse_others(folder)
  name = files.temporary_name(f".{folder.name}")
  if files.is_far(folder):
    part = files.make_scratch() / name
  else:
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.look_once(folder.parent)
    part = folder.with_name(name)
  part.mkdir()
  try:
    with files.writing(part if files.is_far(folder) else folder, part):
      _write(model, part, card_name or folder.name, trunks)
    files.replace_folder(part, folder, last=CONFIG)
  finally:
    shutil.rmtree(part.parent if files.is_far(folder) else part, ignore_errors=True)
  return folder


def _refuse_others(folder: files.Path) -> None:
  if files.is_file(folder):
    raise ValueError(f"{folder}: is a file; allowed: a new or empty folder, or a saved model")
  there = [path.name for path in files.children(folder)]
  if there and not (is_saved(folder) and set(there) <= {CONFIG, ARRAYS, CARD, TRUNKS}):
    raise ValueError(f"{folder}: holds {', '.join(there[:10])}; allowed: a new or empty folder, or a saved model")


def _needed(towers: Mapping[str, Any], modalities: Collection[str]) -> list[str]:
  """The modalities, and those whose heads map a part of theirs."""
  return sorted({*modalities, *(towers[m]["meaning"] for m in modalities if towers[m].get("meaning"))})


def _reduced(plain: Mapping[str, Any], modalities: Collection[str]) -> dict[str, Any]:
  """What embeddings of the modalities need of a plain config: nothing of data, stages and paths."""
  towers, model, codebook = plain["model"]["towers"], dict(plain["model"]), dict(plain.get("codebook", {}))
  model["towers"] = {m: dict(towers[m]) | {"starts_from": ""} for m in _needed(towers, modalities)}
  if "codes" in codebook:
    codebook["codes"] = {m: value for m, value in codebook["codes"].items() if m in model["towers"]}
  kept = {key: plain[key] for key in ("method", "method_options") if key in plain}
  templates = plain.get("data", {}).get("eval_templates")
  return kept | {"model": model, "codebook": codebook} | ({"data": {"eval_templates": templates}} if templates else {})


def _write(model: Any, part: Path, name: str, mode: str) -> None:
  plain = _reduced(schema.to_plain(model.config), model.modalities)
  towers, records, outside, left_out = plain["model"]["towers"], {}, {}, set()
  params = {m: lora.merge(value) if isinstance(value, Mapping) else value for m, value in model.params.items()}
  for m, tower in towers.items():
    trunk = model.trunk(m)
    options, record, here = _write_trunk(trunk, tower["trunk"], tower["options"], part, m)
    values = trunk.params if tower["cache"] else params[m].get("trunk", {})
    if mode == "reference" and not here:
      raise ValueError(f"trunks: got 'reference', but the trunk of {m!r} came from a saved model that includes it; "
                       "allowed: 'include'")  # fmt: skip
    if mode == "reference" and trunk.load and record["checkpoints"] and _unchanged(trunk, tower, values):
      options, reference = _reference(tower["options"], record)
      record |= {"values": "reference", **reference}
      if not record["paths"]:
        shutil.rmtree(part / TRUNKS / m)
      left_out |= {f"params/{m}/trunk/", f"trunks/{m}/"}
    elif tower["cache"]:
      outside[m] = values
    record |= {"parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(values))}
    towers[m], records[m] = tower | {"options": options}, record
  arrays = flat({"params": params, "codebooks": model.codebooks, "trunks": outside})
  content = {"model_type": MODEL_TYPE, "format": FORMAT, "version": _version(),
             "modalities": list(model.modalities), "config": plain, "trunks": records}  # fmt: skip
  config = _opened_config(content, part)
  made = {m: _made(part, content, config, m) for m in towers}
  for m, trunk in made.items():
    if trunk.fingerprint != model.trunk(m).fingerprint:
      raise ValueError(f"trunk of {m!r}: {towers[m]['trunk']!r} is another one when it is made of what a saved model "
                       "keeps of its files; it cannot be saved")  # fmt: skip
  expected = _expected(config, made)
  drop = tuple(left_out)
  keep = {path: x for path, x in arrays.items()
          if not path.startswith(drop) and (path in expected or path.startswith("trunks/"))}  # fmt: skip
  if missing := sorted(path for path in set(expected) - set(keep) if not path.startswith(drop)):
    raise ValueError(f"the model lacks arrays: {', '.join(missing[:10])}")
  for m in records:
    if records[m]["values"] == "reference":
      kinds = {path: str(x.dtype) for path, x in arrays.items()
               if path.startswith(f"params/{m}/trunk/") and x.dtype != np.float32}  # fmt: skip
      records[m] |= {"types": kinds} if kinds else {}
  if (part / TRUNKS).is_dir() and not any((part / TRUNKS).iterdir()):
    (part / TRUNKS).rmdir()
  arrays_of = write_safetensors(part / ARRAYS, keep, {"format": "pt", "library": MODEL_TYPE})
  beside = sorted(path for path in (part / TRUNKS).rglob("*") if path.is_file())
  files_of = {path.relative_to(part).as_posix(): files.file_checksum(path) for path in beside}
  content = files.sealed(content | {"checksums": {"arrays": arrays_of, "files": files_of}})
  _write_text(part / CONFIG, json.dumps(content, indent=1) + "\n")
  _write_text(part / CARD, card(content, {path: tuple(x.shape) for path, x in keep.items()}, name))


def _write_text(path: Path, text: str) -> None:
  with open(path, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def flat(tree: Any) -> dict[str, Any]:
  """Path such as "params/image/trunk/stem/cls_token" -> array."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def _write_trunk(
  trunk: Trunk, family: str, options: Mapping[str, Any], part: Path, modality: str
) -> tuple[dict[str, Any], dict[str, Any], bool]:
  """Writes what a trunk is made of.

  Returns:
    its options, with paths inside the saved folder; its record; whether its checkpoint is here, not its shapes alone.
  """
  known = keys_of(trunk_maker(family))
  # What a trunk found in its checkpoint's path is among the options that it was made with.
  found = {key: value for key, value in schema.to_plain(dict(trunk.options)).items() if key in known}
  options = dict(options) | found | {"weights": options.get("weights", "")}
  with noted() as notes:
    load_trunk(family, **options)
  folder, inside = part / TRUNKS / modality, f"{TRUNKS}/{modality}"
  files_of = {key for key in known if key in _PATHS or Path in typing.get_args(known[key][0])}
  sources = {key: Path(options[key]).expanduser().absolute() for key in files_of & set(options)
             if options[key] not in ("", "random")}  # fmt: skip
  sources = {key: path for key, path in sources.items() if path.exists() or present(path)}
  folders = [path for path in sources.values() if path.is_dir()]
  contents: dict[str, Any] = {}
  for path in folders:
    small = [name for name in _SMALL if (path / name).is_file() and (modality == "text" or name not in _OF_TEXT)]
    contents |= {name: (path / name).read_bytes() for name in small}
  named = {}  # path -> its name inside the folder
  for path, content in notes.items():
    root = next((one for one in folders if path.is_relative_to(one)), path.parent)
    named[path] = str(path.relative_to(root))
    contents[named[path]] = content
  paths = {}
  for key, path in sources.items():
    if path.is_dir() or path.suffix == ".whl":
      paths[key] = inside
    else:
      named.setdefault(path, path.name)
      contents.setdefault(path.name, path.read_bytes() if path.is_file() else b"")
      paths[key] = f"{inside}/{named[path]}"
  if not paths and notes:
    paths["weights"] = inside  # the packaged checkpoint
  checkpoints = {}
  for name, content in contents.items():
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Weights):
      file = file.with_name(_whole(file.name))
      write_shapes(file, content)
      checkpoints[file.name] = content.sha256
    else:
      file.write_bytes(content)
  record = {"family": family, "licence": trunk.licence, "values": "included", "paths": paths}
  here = all(file.is_file() for content in contents.values() if isinstance(content, Weights) for file in content.files)
  return options | paths, record | {"checkpoints": checkpoints}, here


def _whole(name: str) -> str:
  """A checkpoint's name, also if it lies in shards: that of their index."""
  return name.removesuffix(".index.json")


def _unchanged(trunk: Trunk, tower: Mapping[str, Any], values: Any) -> bool:
  """Whether a trunk's values are its checkpoint's, in the types in which the model keeps them."""
  if tower["cache"]:
    return True
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
  original = flat(trunk.load(shapes))
  return all(np.array_equal(np.asarray(x), np.asarray(original[path])) for path, x in flat(values).items())


def _reference(options: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[dict, dict]:
  """A trunk's options with its own checkpoint, and the place at which that is found again."""
  weights = str(options.get("weights", ""))
  path = Path(weights).expanduser().absolute()
  paths = {key: value for key, value in record["paths"].items() if key != "weights"}
  source = hub.name_of(path) or str(path) if weights else ""
  return dict(options) | paths | {"weights": ""}, {"paths": paths, "source": source}


def read(folder: Path, modalities: Sequence[str] | None = None) -> Saved:
  """A saved model's parts.

  Args:
    folder: that `write` made.
    modalities: those to load; all unless given.

  Raises:
    ValueError: if a file is damaged or missing, an array is missing, superfluous or misshapen (all in one error), or a
      checkpoint that a trunk refers to is missing or another one.
  """
  content = _content(folder)
  there = tuple(content["modalities"])
  for m in modalities or ():
    if m not in there:
      raise ValueError(f"{folder}: has no modality {m!r}; it has {', '.join(there)}")
  chosen = there if modalities is None else tuple(modalities)
  with _config_errors(folder):
    content = content | {"config": _reduced(content["config"], chosen)}
    config = _opened_config(content, folder)
  if not (folder / ARRAYS).is_file():
    raise ValueError(f"{folder}: no weights; looked for {ARRAYS}, found {', '.join(sorted(os.listdir(folder)))}")
  weights = open_weights(folder / ARRAYS)
  _verify_files(folder, content, config.model.towers)
  trunks = {m: _made(folder, content, config, m) for m in config.model.towers}
  with _config_errors(folder):
    expected = _expected(config, trunks)
  outside = {}  # trunks whose tokens are cached
  for m, tower in config.model.towers.items():
    if content["trunks"][m]["values"] == "reference":
      expected = {p: x for p, x in expected.items() if not p.startswith(f"params/{m}/trunk/")}
    elif tower.cache:
      outside |= {f"trunks/{m}/{path}": x for path, x in flat(trunks[m].shapes).items()}
  sums = content["checksums"]["arrays"]
  arrays = _arrays(weights, expected | outside, sums, whole=set(chosen) == set(there))
  tree = unflatten_dict(arrays, sep="/")
  params = tree.get("params", {})
  for m, tower in config.model.towers.items():
    if content["trunks"][m]["values"] == "reference":
      if not tower.cache:
        types = content["trunks"][m].get("types", {})
        params.setdefault(m, {})["trunk"] = trunks[m].load(jax.tree_util.tree_map_with_path(
          lambda path, x, m=m, types=types: jax.ShapeDtypeStruct(x.shape, types.get(
            f"params/{m}/trunk/{jax.tree_util.keystr(path, simple=True, separator='/')}", x.dtype)), trunks[m].shapes))
    elif tower.cache:
      values = tree.get("trunks", {}).get(m, {})
      trunks[m] = dataclasses.replace(trunks[m], load=lambda _, values=values: values)
    for part in ("trunk", "shared"):  # those without parameters
      if not tower.cache:
        params.setdefault(m, {}).setdefault(part, {})
  codebooks = config_lib.method_of(config).restore(tree.get("codebooks", {}))
  return Saved(config, params, codebooks, trunks, chosen)


def _verify_files(folder: Path, content: Mapping[str, Any], modalities: Collection[str]) -> None:
  """Verifies the small files of some trunks.

  Raises:
    ValueError: naming one that is missing or damaged.
  """
  for name, expected in content["checksums"]["files"].items():
    parts = name.split("/")
    if len(parts) < 2 or ".." in parts:
      raise ValueError(f"{folder / CONFIG}: damaged: it has a checksum of {name!r:.80}, which is no file of a trunk")
    if parts[1] in modalities:
      try:
        found = files.file_checksum(folder / name)
      except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{folder / name}: is missing; it was saved with the model") from error
      files.verify(found, expected, folder / name)


def _version() -> str:
  try:
    return importlib.metadata.version("codebind_jax")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _content(folder: Path) -> dict[str, Any]:
  with _config_errors(folder):
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    newer = content["format"] > FORMAT
    for key, kind in {"modalities": list, "config": dict, "trunks": dict}.items():
      _of_kind(content, key, kind)
    if not newer and not all(isinstance(name, str) for name in content["modalities"]):
      raise TypeError(f"'modalities' is {content['modalities']!r:.80}; allowed: names")
    for name in () if newer else content["trunks"]:
      record = _of_kind(content["trunks"], name, dict)
      for key, kind in {"family": str, "values": str, "paths": dict, "checkpoints": dict}.items():
        _of_kind(record, key, kind)
  if newer:
    raise ValueError(f"{folder / CONFIG}: has format {content['format']} (codebind_jax {content.get('version')}); "
                     f"codebind_jax {_version()} reads up to {FORMAT}")  # fmt: skip
  content = files.unsealed(content, folder / CONFIG)
  with _config_errors(folder):
    for key in ("arrays", "files"):
      _of_kind(_of_kind(content, "checksums", dict), key, dict)
  return content


def _of_kind(section: Mapping[str, Any], key: str, kind: type) -> Any:
  """The value of a key, of a JSON type.

  Raises:
    KeyError: if there is none.
    TypeError: if it is of another type.
  """
  if not isinstance(section[key], kind):
    raise TypeError(f"{key!r} is a {type(section[key]).__name__}; allowed: {kind.__name__}")
  return section[key]


@contextlib.contextmanager
def _config_errors(folder: Path) -> Iterator[None]:
  """Makes what a damaged config raises a ValueError with the file's name."""
  try:
    yield
  except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{folder / CONFIG}: not the config of a saved model ({error!r})") from error
  except ValueError as error:
    raise error if str(folder) in str(error) else ValueError(f"{folder / CONFIG}: {error}") from error


def _opened_config(content: Mapping[str, Any], folder: Path) -> config_lib.Config:
  """The config, with the paths of the trunks' files in this folder, or where a trunk that is referred to lies."""
  plain = schema.to_plain(content["config"])
  for m, tower in plain["model"]["towers"].items():
    record = content["trunks"][m]
    tower["options"] |= {key: str(folder / path) for key, path in record["paths"].items()}
    if record.get("source"):
      tower["options"]["weights"] = str(_found(folder, m, record))
  return config_lib.read_saved(plain)


def _found(folder: Path, modality: str, record: Mapping[str, Any]) -> Path:
  """The checkpoint that a trunk refers to: from the hub, at its path, or under its name beside the saved folder."""
  if record["source"].startswith(hub.PREFIX):
    return hub.fetch(record["source"])
  places = dict.fromkeys((Path(record["source"]), folder.absolute().parent / Path(record["source"]).name))
  for place in places:
    if place.exists():
      return place
  hashes = ", ".join(f"{name} with SHA-256 {value}" for name, value in record["checkpoints"].items())
  raise ValueError(f"{folder}: its trunk of {modality!r} refers to {hashes}; looked for {', '.join(map(str, places))}; "
                   "put it at one of these, or save the model with trunks='include'")  # fmt: skip


def _made(folder: Path, content: Mapping[str, Any], config: config_lib.Config, modality: str) -> Trunk:
  """A trunk made of the files in the folder; that of another checkpoint than it refers to is refused."""
  tower, record = config.model.towers[modality], content["trunks"][modality]
  with noted() as notes:
    trunk = load_trunk(tower.trunk, **tower.options)
  if record["values"] == "reference":
    found = {_whole(path.name): x.sha256 for path, x in notes.items() if isinstance(x, Weights)}
    for name, want in record["checkpoints"].items():
      if found.get(name) != want:
        has = f"has SHA-256 {found[name]}" if name in found else f"has {', '.join(found) or 'none'}"
        where = tower.options.get("weights") or "the packaged checkpoint"
        raise ValueError(f"{folder}: its trunk of {modality!r} refers to {name} with SHA-256 {want}; {where} {has}")
  return trunk


def _expected(config: config_lib.Config, trunks: Mapping[str, Trunk]) -> dict[str, Any]:
  """Path -> shape of the arrays of the model: parameters and codebooks."""
  init = make_init(config_lib.method_of(config), input_shapes(config.model, trunks))
  params, codebooks, _ = jax.eval_shape(init, jax.random.key(0))
  return flat({"params": params, "codebooks": codebooks})


def _arrays(
  weights: Weights, shapes: Mapping[str, Any], expected: Mapping[str, str], whole: bool
) -> dict[str, jax.Array]:
  """The arrays, each placed before the next one is read, in the types of the file, and verified meanwhile."""
  missing = sorted(set(shapes) - set(weights))
  superfluous = sorted(set(weights) - set(shapes)) if whole else []
  wrong = [f"{path} {weights[path].shape} for {tuple(x.shape)}" for path, x in shapes.items()
           if path in weights and weights[path].shape != tuple(x.shape)]  # fmt: skip
  if missing or superfluous or wrong:
    raise ValueError(f"{weights.name}: missing {missing}; superfluous {superfluous}; wrong shape {wrong}")
  arrays = {}
  check = lambda path, found: files.verify(found, expected.get(path), f"{weights.name}: array {path!r}")
  with files.Checksums(check) as checksums:
    for path in shapes:
      array = weights[path].read()
      checksums.add(path, array)
      arrays[path] = jax.device_put(array)
  return arrays
