"""JSON that is read: whatever is wrong with it is a ValueError that names where it is from."""

from __future__ import annotations

import json
from typing import Any

from codebind_jax.files.far import Path
from codebind_jax.files.places import read_bytes

_SAID = {dict: "an object", list: "a list", str: "a text", int: "a whole number from 0 to 2^63", float: "a number",
         bool: "true or false"}  # fmt: skip


def from_json(content: bytes | str, what: Any) -> Any:
  """The value of a JSON text.

  Args:
    content: the text; bytes are UTF-8.
    what: it is from, for the error.

  Raises:
    ValueError: if it is none, or nested too deeply.
  """
  try:
    return json.loads(content.decode() if isinstance(content, bytes) else content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what}: damaged, no readable JSON ({error})") from error


def read_json(path: Path) -> Any:
  """The value of a JSON file.

  Raises:
    ValueError: naming the file, if it is none.
    FileNotFoundError: if it is not there.
    OSError: if it cannot be read.
  """
  return from_json(read_bytes(path), path)


def check_form(value: Any, form: Any, what: Any) -> None:
  """Checks what JSON has where.

  Args:
    value: that was read.
    form: a type (whole numbers are counts, which are not negative); `[form]` for a list; `{str: form}` for an object of
      any keys; `{"a": form}` for one that has these keys at least; None for anything.
    what: it is from, for the error.

  Raises:
    ValueError: naming the first place that is otherwise.
  """
  for at, found, allowed in _misfits(value, form, ""):
    raise ValueError(f"{what}: not as this version writes it: {at or 'all of it'} is {found!r:.80}; allowed: {allowed}")


def _misfits(value: Any, form: Any, at: str) -> Any:
  """(place, value there, what is allowed) of all that has another form."""
  kind = type(form) if isinstance(form, dict | list) else form
  if kind is None:
    return
  # True is no whole number, and a whole number may stand for any other.
  fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
  if not fits or kind is int and not 0 <= value < 1 << 63:
    yield at, value, _SAID[kind]
  elif isinstance(form, list):
    for number, one in enumerate(value):
      yield from _misfits(one, form[0], f"{at}[{number}]")
  elif isinstance(form, dict) and str in form:
    for key, one in value.items():
      yield from _misfits(one, form[str], f"{at}[{key!r:.80}]")
  elif isinstance(form, dict):
    for key, one in form.items():
      if key not in value:
        yield f"{at}[{key!r}]", None, "it is missing"
      else:
        yield from _misfits(value[key], one, f"{at}[{key!r}]")
