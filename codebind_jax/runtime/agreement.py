"""Processes of one run compare what they are about to do, so that none computes something else without a word.

Compared are the command's config, the package's files, versions, and the data as each process sees it: by hashes, and
where these differ, by what they are made of, so that the error names it, the same on every process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt64

from codebind_jax import files, schema
from codebind_jax.runtime import distributed

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
# Settings of JAX that decide what is computed.
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
            "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")  # fmt: skip
# Keys of a config in which the processes of a run may differ.
FREE = ("data.workers", "data.threads")
SAMPLE = 32  # items of each modality of a source whose content is compared
_PARTS = 256  # of rows, in the search for the first that differs
_SHOWN = 5  # differences that an error names


def check_command(config: Any, workdir: str | files.Path | None) -> None:
  """Compares the command, the package and the environment of all processes.

  Args:
    config: ConfigDict, dict or `Config`.
    workdir: of the run.

  Raises:
    ValueError: on every process, naming what differs.
  """
  if jax.process_count() > 1:
    _compare("command", {**_flat(schema.to_plain(config), "config"), "workdir": str(workdir), **environment(),
                         **package_files()})  # fmt: skip


def environment() -> dict[str, str]:
  """Versions, JAX's settings and this process's devices."""
  versions = {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
  own = {"codebind_jax": sys.modules["codebind_jax"].__version__, "Python": platform.python_version()}
  versions |= {f"version of {name}": version for name, version in own.items()}
  devices = jax.local_devices()
  return versions | {name: repr(getattr(jax.config, name, None)) for name in SETTINGS} | {
    "devices of a process": f"{len(devices)} x {devices[0].device_kind}"
  }  # fmt: skip


def package_files() -> dict[str, str]:
  """Path -> hash of every file of this package."""
  root = pathlib.Path(__file__).parents[1]
  found = sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so")
  return {f"{p.relative_to(root.parent)}": hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in found}


def check(what: str, plain: Any) -> None:
  """Compares sections of sections of values, such as a config.

  Args:
    what: it is; the errors' paths begin so.
    plain: this process's.

  Raises:
    ValueError: on every process, naming the paths at which values differ.
  """
  if jax.process_count() > 1:
    _compare(what, _flat(schema.to_plain(plain), what))


def check_sources(sources: Mapping[str, Any]) -> None:
  """Compares data as each process sees it: ids, labels, splits and modalities of all records, and content of some.

  Args:
    sources: `data.records.Source` by name.

  Raises:
    ValueError: on every process, naming the source and the first record that differs.
  """
  if jax.process_count() == 1:
    return
  _compare("sources", {f"source {name!r}": "there" for name in sources})
  for name, source in sources.items():
    rows = row_hashes(source)
    found = distributed.gathered(json.dumps([len(source), _digest(rows)]), f"records of {name!r}")
    if (other := _first_other(found)) is not None:
      row = _first_row(rows, other, f"records of {name!r}")
      own = describe(source, row) if row < len(source) else "none"
      told = distributed.gathered(own, f"record {row} of {name!r}")
      counts = [json.loads(one)[0] for one in found]
      raise ValueError(f"source {name!r}: {counts[0]} records on process 0, {counts[other]} on process {other}; first "
                       f"other record, number {row}: {told[0]} on process 0, {told[other]} on process {other}"
                       )  # fmt: skip
    _compare(f"content of {name!r}", sampled_contents(source, name))


def row_hashes(source: Any) -> UInt64[np.ndarray, "n"]:
  """A number of each record that changes with its id, label, split and modalities."""
  index = source.index
  labels = np.array([_number(label) for label in (*index.labels, "")], np.uint64)[index.label]
  bits = np.array([_number(modality) for modality in index.modalities], np.uint64)
  modalities = np.zeros(len(index), np.uint64)
  for place, number in enumerate(bits):
    modalities ^= np.where(index.has & np.uint32(1 << place), number, np.uint64(0))
  mixed = np.asarray(index.ids, np.uint64)
  for column in (labels, modalities, index.split.astype(np.int64).view(np.uint64)):
    mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)  # golden ratio: spreads the bits
    mixed ^= mixed >> np.uint64(29)
  return mixed


def describe(source: Any, row: int) -> str:
  """A record, for messages."""
  modalities = [modality for modality in source.modalities if source.has(row, modality)]
  label = source.index.label_of(row)
  return f"{source.fields(row)['id']!r} ({', '.join(modalities)}{f', label {label!r}' if label is not None else ''})"


def sampled_contents(source: Any, name: str) -> dict[str, str]:
  """Hashes of the content of records spread over a source, by what they are."""
  found = {}
  for modality in source.modalities:
    rows = source.rows_with(modality)
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64))].tolist():
      try:
        # Of a large file parts alone are read.
        content = source.content_hash(row, modality) if modality == "text" else source.content_of_item(
          row, modality, source.read(row, modality))[:16]  # fmt: skip
      except (ValueError, OSError):  # which reading it says, unless it is allowed
        content = "cannot be read"
      found[f"source {name!r}: {modality} of record {source.fields(row)['id']!r}"] = content
  return found


def _compare(what: str, own: Mapping[str, str]) -> None:
  """Compares a process's own parts with those of the others.

  Raises:
    ValueError: naming the first parts that differ, the same on all processes.
  """
  other = _first_other(distributed.gathered(_digest(sorted(own.items())), what))
  if other is None:
    return
  shown = json.dumps(dict(own)) if jax.process_index() in (0, other) else ""
  told = distributed.gathered(shown, f"difference in {what}")
  raise ValueError(difference(json.loads(told[0]), json.loads(told[other]), other))


def difference(first: Mapping[str, str], second: Mapping[str, str], other: int) -> str:
  """One line that names the parts in which two processes differ.

  Args:
    first: parts of process 0.
    second: parts of the other.
    other: its number.
  """
  keys = [key for key in dict.fromkeys((*first, *second)) if first.get(key) != second.get(key)]
  lines = []
  for key in keys[:_SHOWN]:
    a, b = (found.get(key, "none") for found in (first, second))
    hashes = key.startswith(("codebind_jax/", "source ")) and "none" not in (a, b)
    lines.append(f"{key} differs" if hashes else f"{key}: process 0 has {a}, process {other} has {b}")
  more = f"; {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
  return f"processes 0 and {other} of this run are not alike: {'; '.join(lines)}{more}"


def _first_other(values: Sequence[str]) -> int | None:
  """Number of the first process whose value is not that of process 0; None if all are alike."""
  return next((number for number, value in enumerate(values) if value != values[0]), None)


def _first_row(rows: UInt64[np.ndarray, "n"], other: int, what: str) -> int:
  """The first row in which process 0 and another differ, found by hashes of ever smaller parts; all must call it."""
  longest = max(int(count) for count in distributed.gathered(str(len(rows)), what))
  first, last = 0, longest
  while last - first > 1:
    edges = np.unique(np.linspace(first, last, _PARTS + 1).astype(np.int64)).tolist()
    parts = json.dumps([_digest(rows[a:b]) for a, b in zip(edges, edges[1:])])
    found = distributed.gathered(parts, what)
    pairs = zip(json.loads(found[0]), json.loads(found[other]))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
    first, last = edges[place], edges[place + 1]
  return first


def _flat(plain: Any, path: str) -> dict[str, str]:
  """Dotted path -> value as text, without the keys that are free."""
  if isinstance(plain, Mapping) and plain:
    return {key: value for name, part in plain.items() for key, value in _flat(part, f"{path}.{name}").items()}
  return {} if path.removeprefix("config.") in FREE else {path: repr(plain)}


def _digest(value: Any) -> str:
  plain = isinstance(value, np.ndarray)
  content = np.ascontiguousarray(value).data if plain else json.dumps(value).encode("utf-8", "surrogatepass")
  return hashlib.sha256(content).hexdigest()[:16]


def _number(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")
