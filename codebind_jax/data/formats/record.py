"""One record as its file gives it, a mapping of keys to plain values: fields, and items of modalities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from codebind_jax.data.records import SPLITS, known_modalities

_SPLIT_NAMES = {split: split for split in SPLITS} | {"validation": "val"}
_TEXT = ("text", "caption")


@dataclasses.dataclass(frozen=True)
class Record:
  """A parsed record.

  Attributes:
    fields: `id`, `label` (None where there is none), `text` and `split` where given, and further keys.
    items: modality -> path as written, or a file's bytes.
    further: keys that are neither a modality nor a known field.
  """

  fields: dict[str, Any]
  items: dict[str, str | bytes]
  further: tuple[str, ...] = ()

  @property
  def modalities(self) -> list[str]:
    """Those that the record has."""
    return [*(["text"] if "text" in self.fields else []), *self.items]


def parse(record: Mapping[str, Any], default_id: str) -> Record:
  """The record of a mapping.

  `id` and `label` may be integers, a null is an absent key, `validation` is split val, `caption` is `text`.

  Args:
    record: keys and values.
    default_id: id of a record that names none.

  Raises:
    ValueError: naming the key that is wrong.
  """
  fields: dict[str, Any] = {"id": default_id, "label": None}
  items: dict[str, str | bytes] = {}
  further = []
  texts = [key for key in _TEXT if record.get(key) is not None]
  if len(texts) > 1:
    raise ValueError("text and caption are both there; one of them is needed")
  known = _known()
  for key, value in record.items():
    if value is None:
      continue
    if key in ("id", "label"):
      fields[key] = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(key, value)
    elif key == "split":
      if _text(key, value) not in _SPLIT_NAMES:
        raise ValueError(f"unknown split {value!r}; allowed: {list(SPLITS)}")
      fields[key] = _SPLIT_NAMES[value]
    elif key in _TEXT:
      fields["text"] = [_text(key, v) for v in (value if isinstance(value, list) else [value])]
      if not fields["text"]:
        raise ValueError(f"{key}: an empty list")
    elif key in known:
      items[key] = _item(key, value)
    else:
      further.append(key)
      fields.setdefault(key, value)
  if not items and "text" not in fields:
    raise ValueError(f"no modality; at least one of {list(known_modalities())} is needed")
  return Record(fields, items, tuple(further))


def _known() -> frozenset[str]:
  return frozenset(known_modalities())


def _item(key: str, value: Any) -> str | bytes:
  """A path or a file's bytes, also as `{"bytes": ..., "path": ...}`."""
  if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
    value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
  if isinstance(value, bytes) and value:
    return value
  return _text(key, value)


def _text(key: str, value: Any) -> str:
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{key}: a string that is not empty is needed, got {value!r:.80}")
  return value
