"""Opens a source: a split of a packaged world, or a user's manifest."""

from __future__ import annotations

from pathlib import Path

from codebind_jax.data.manifest import read_manifest
from codebind_jax.data.records import Source
from codebind_jax.data.worlds import registry
from codebind_jax.data.worlds.source import WorldSource


def open_source(
  files: str | Path,
  *,
  split: str = "",
  profile: str = "auto",
  data_dir: str | Path | None = None,
  max_bad_records: int = 0,
) -> Source:
  """Opens a split of a packaged world, or a manifest.

  Args:
    files: path of a JSONL manifest, or `world:NAME` for a packaged world, which is built if it is not there.
    split: train, val or test; "" takes all records of a manifest.
    profile: of a world; a manifest has none.
    data_dir: where worlds are, see `fetch.data_dir` for the default; a manifest has its own place.
    max_bad_records: bad records of a manifest that are left out before it is an error; a world has none.

  Raises:
    ValueError: for an unknown world, profile or split, a world without `split`, an argument that a source of this kind
      has not, or a bad manifest; see `read_manifest`.
  """
  kind, _, world = str(files).partition(":")
  if kind != "world":
    if profile != "auto":
      raise ValueError(f"{files}: got profile {profile!r}; allowed for a manifest: 'auto', only worlds have profiles")
    if data_dir is not None:
      raise ValueError(f"{files}: got data_dir {str(data_dir)!r}; allowed for a manifest: None, only worlds are built")
    return read_manifest(Path(files), split=split, max_bad_records=max_bad_records)
  if max_bad_records:
    raise ValueError(f"{files}: got max_bad_records {max_bad_records!r}; allowed for a world: 0, it has none")
  if not split:
    raise ValueError(f"{files}: needs a split, such as 'train'")
  module = registry.world_module(world)
  if hasattr(module, "open_split"):
    return module.open_split(registry.resolve(world, profile), split)
  return WorldSource(registry.ensure(world, profile, data_dir), split)


def class_names(source: Source, path: Path | None = None) -> tuple[str, ...]:
  """Candidate labels: the lines of a text file, or the labels that occur in the source, sorted.

  Raises:
    ValueError: if there are none, or a line occurs twice, or a label of the source is not among them.
  """
  labels = sorted({row["label"] for row in source.rows if row.get("label")})
  if path is None:
    if not labels:
      raise ValueError(f"empty class list: no row of {source.name} has a label")
    return tuple(labels)
  lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
  classes = [line for line in lines if line]
  if not classes:
    raise ValueError(f"{path}: empty class list; one class a line is needed")
  first: dict[str, int] = {}
  for number, line in enumerate(lines, 1):
    if line and first.setdefault(line, number) != number:
      raise ValueError(f"{path}:{number}: class {line!r} is there twice, first in line {first[line]}")
  unknown = [label for label in labels if label not in first]
  if unknown:
    raise ValueError(f"{path}: label {unknown[0]!r} of {source.name} is not among its {len(classes)} classes")
  return tuple(classes)
