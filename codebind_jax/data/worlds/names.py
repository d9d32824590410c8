"""Tables of the packaged worlds, and how a name becomes a concept and a key becomes a split."""

import functools
import hashlib
import importlib.resources
import json
import re
import unicodedata
from typing import Any

_CAMEL = re.compile(r"([a-z])([A-Z][a-z])")
_NUMBER = re.compile(r"-?\d+(-x)?$")


@functools.cache
def table_bytes(name: str) -> bytes:
  """Content of `tables/<name>.json` as shipped with the package.

  Raises:
    ValueError: if there is no such table.
  """
  folder = importlib.resources.files("codebind_jax.data.worlds") / "tables"
  path = folder / f"{name}.json"
  if not path.is_file():
    have = sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))
    raise ValueError(f"unknown table {name!r}; the package has {have}")
  return path.read_bytes()


@functools.cache
def table(name: str) -> dict[str, Any]:
  """Parsed `tables/<name>.json`; shared, so treat it as read-only."""
  return json.loads(table_bytes(name))


def table_hash(name: str) -> str:
  """SHA-256 of a table, which a built world's manifest records."""
  return hashlib.sha256(table_bytes(name)).hexdigest()


def concepts() -> dict[str, dict[str, Any]]:
  """Concept name -> {label, texts, group, split, ...}; `split` is None outside the text-image bridge."""
  return table("concepts")["concepts"]


def slug(name: str) -> str:
  """ASCII, lower case, words joined by "-": "Piñata & Co's" -> "pinata-cos"."""
  ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
  return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[&'’]", "", ascii_name)).strip("-")


def to_concept(name: str) -> str:
  """Concept that a name stands for: camel case split, slug, alias, number suffix stripped, alias again.

  Args:
    name: a label, tag or file name without extension, such as "CarPassing" or "apples2".

  Returns:
    The concept, or the slug itself where the name stands for no known concept.
  """
  alias = table("aliases")["alias"]
  key = slug(_CAMEL.sub(r"\1-\2", name))
  key = alias.get(key, key)
  stripped = _NUMBER.sub("", key)
  if stripped and stripped != key:
    key = alias.get(stripped, stripped)
  return key


def unit_hash(salt: str, key: str) -> float:
  """Number in [0, 1) that decides a split: the first 12 hex digits of sha256("salt:key") over 16**12."""
  return int(hashlib.sha256(f"{salt}:{key}".encode()).hexdigest()[:12], 16) / 16**12
