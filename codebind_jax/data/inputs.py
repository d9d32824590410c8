"""What an encoder wants of one item; everything that prepares items on the host is picklable and imports no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data import transforms
from codebind_jax.data.ranges import ChangedError
from codebind_jax.data.reading import MACHINE


def stack(items: Sequence[np.ndarray]) -> np.ndarray:
  """One batch of equally shaped items, [b, ...]."""
  return np.stack(list(items))


@contextlib.contextmanager
def item_errors() -> Iterator[None]:
  """Makes whatever a reader raises for a bad item a ValueError; errors of the machine and of the installation stay.

  Raises:
    ValueError: naming the kind of another error.
  """
  try:
    yield
  except (ValueError, MemoryError, ImportError, ChangedError, TimeoutError, ConnectionError):
    raise
  except OSError as error:
    if error.errno in MACHINE:
      raise
    raise ValueError(str(error)) from error
  except Exception as error:
    raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error


@dataclasses.dataclass(frozen=True)
class Reading:
  """A preparation that takes paths and bytes too.

  Attributes:
    read: any value -> the decoded one; decoded values as they are.
    prepare: the decoded value -> an array.
    open: a path or bytes -> what `prepare` takes as well, with fewer copies than `read`; None for `read`.
  """

  read: Callable[[Any], Any]
  prepare: Callable[[Any], np.ndarray]
  open: Callable[[Any], Any] | None = None

  def __call__(self, value: Any) -> np.ndarray:
    """The prepared array of a path, bytes or decoded value."""
    read = self.open if self.open and isinstance(value, str | bytes | Path) else self.read
    return self.prepare(read(value))


@dataclasses.dataclass(frozen=True)
class Input:
  """What a trunk wants of one item. Its functions are picklable, as worker processes call them.

  Attributes:
    shape: of a prepared item, such as (224, 224, 3).
    dtype: of a prepared item: uint8 pixels, int32 ids, float32 otherwise.
    prepare: on the host, one decoded value -> an array of this shape and type; imports no JAX.
    collate: prepared items -> batch; may cut padding that no item of the batch needs.
    read: on the host, a path, bytes or array -> decoded value; None for the modality's transform.
    revision: changes whenever the same item would be prepared to other values.
  """

  shape: tuple[int, ...]
  dtype: str
  prepare: Callable[[Any], np.ndarray] = dataclasses.field(repr=False)
  collate: Callable[[Sequence[np.ndarray]], np.ndarray] = dataclasses.field(default=stack, repr=False)
  read: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)
  revision: str = ""

  def opened(self, modality: str, value: Any) -> Any:
    """The decoded value of a path or of a file's bytes, by `read` or the modality's transform; others as they are.

    Args:
      modality: of the item; a text is never a path.
      value: the item.

    Raises:
      ValueError: naming the file, if it cannot be read.
    """
    if modality == "text" or not isinstance(value, str | bytes | Path):
      return value
    with item_errors():
      return (self.read or transforms.of(modality).read)(value)

  def prepared(self, modality: str, value: Any) -> np.ndarray:
    """`prepare(opened(value))`, by the shortest way.

    Args:
      modality: of the item.
      value: as of `opened`.

    Raises:
      ValueError: if it cannot be read.
    """
    direct = self.read is None and isinstance(self.prepare, Reading) and self.prepare.open
    if not direct or not isinstance(value, str | bytes | Path):
      value = self.opened(modality, value)
    with item_errors():
      return self.prepare(value)
