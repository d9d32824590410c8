"""The order of rows that are read in blocks, such as Parquet's row groups: a function of the position."""

from __future__ import annotations

import functools
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

WINDOW = 8  # blocks whose rows are mixed


class BlockOrder(grain.transforms.Map):
  """Position -> row: every epoch visits the blocks in another order, and mixes the rows of `WINDOW` blocks at a time.

  A reader needs so many blocks at once, however many there are. Rows of a batch come from few blocks, so that a file
  should not be sorted by what is learned.

  Args:
    rows: n.
    block: rows of a block, but for the last one.
    usable: rows of an epoch, at most n; the last of its order are left out.
    seed: of all orders.
  """

  def __init__(self, rows: int, block: int, usable: int, seed: int):
    self._rows, self._block, self._usable, self._seed = rows, block, usable, seed
    self._clear()

  def _clear(self) -> None:
    self._blocks = functools.lru_cache(maxsize=2)(self._blocks_of)
    self._window = functools.lru_cache(maxsize=4)(self._window_of)

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name not in ("_blocks", "_window")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._clear()

  def map(self, position: int) -> int:
    """The row at a position, counted over all epochs."""
    epoch, at = divmod(position, self._usable)
    _, ends = self._blocks(epoch)
    window = int(np.searchsorted(ends, at, "right"))
    return int(self._window(epoch, window)[at - (int(ends[window - 1]) if window else 0)])

  def _blocks_of(self, epoch: int) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "w"]]:
    """(blocks in the epoch's order, position after each window)."""
    count = -(-self._rows // self._block)
    blocks = np.random.default_rng((self._seed, epoch)).permutation(count)
    sizes = np.minimum(self._block, self._rows - blocks * self._block)
    return blocks, np.add.reduceat(sizes, np.arange(0, count, WINDOW)).cumsum()

  def _window_of(self, epoch: int, window: int) -> Int[np.ndarray, "n"]:
    """The rows of a window in their order."""
    blocks = self._blocks(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
    rows = [np.arange(b * self._block, min((b + 1) * self._block, self._rows)) for b in blocks]
    return np.random.default_rng((self._seed, epoch, window)).permutation(np.concatenate(rows))
