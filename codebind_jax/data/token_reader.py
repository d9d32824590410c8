"""Cached tokens by place: what `trunks.cache` has written, read by any thread or process, without JAX."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from codebind_jax import files

OPEN = 256  # shards that are open at once, of those that were read last
READ = "readahead_buffer_size:0,max_parallelism:0"  # random access


class TokenReader:
  """Tokens of items, [tokens, width] each, in ArrayRecord shards; an item's pooled token is a record of its own.

  A place is a number: the shard's times 2**32, and the item's in the shard. Integrity is that of ArrayRecord, which
  compares a checksum at every reading.

  Args:
    shards: the files; more may be added.
    tokens: of an item.
    width: of a token.
    far: folder of a far disk from which a shard that is not there yet is copied.
  """

  def __init__(self, shards: Iterable[Path], tokens: int, width: int, far: files.Path | None = None):
    self.shards, self.tokens, self.width, self._far = list(shards), tokens, width, far
    self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_open": collections.OrderedDict(), "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def __call__(self, place: int, pooled: bool = False) -> Float16[np.ndarray, "n c"]:
    """The tokens of the item at a place, or the pooled one alone.

    Raises:
      OSError: naming the shard, if it is damaged or gone.
    """
    shard, item = place >> 32, place & 0xFFFFFFFF
    records = 1 if self.tokens == 1 else 2
    wanted = [records * item] if pooled or records == 1 else [2 * item, 2 * item + 1]
    try:
      found = b"".join(self._reader(shard).read(wanted))  # of a file that was cut short it may be empty
      values = np.frombuffer(found, np.float16).reshape(1 if pooled else self.tokens, self.width)
    except (RuntimeError, ValueError, IndexError) as error:
      raise OSError(f"{self.shards[shard]}: cached tokens are damaged ({error}); remove this file and its .keys.npy, "
                    "so that they are computed again") from error  # fmt: skip
    return values

  def close(self) -> None:
    """Closes the shards that no thread is reading; a later call opens them anew."""
    with self._lock:
      self._open.clear()

  def _reader(self, shard: int) -> Any:
    with self._lock:
      if shard not in self._open:
        from array_record.python import array_record_module

        if self._far and not self.shards[shard].exists():
          files.download(self._far / self.shards[shard].name, self.shards[shard])
        self._open[shard] = array_record_module.ArrayRecordReader(str(self.shards[shard]), READ)
        if len(self._open) > OPEN:
          self._open.popitem(last=False)  # it is closed when no thread reads it any more
      self._open.move_to_end(shard)
      return self._open[shard]
