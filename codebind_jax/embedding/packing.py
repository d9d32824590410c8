"""Codes as bits: an item takes ceil(log2 K) bits for each of its codes, filled up to whole bytes once.

The first code has the lowest bits of the first byte, as in faiss's `ProductQuantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

UNKNOWN = 1 << 31  # codes of a position where their number is not known


def bits_of(sizes: Sequence[int]) -> tuple[int, ...]:
  """Bits of each code, from the number of codes to choose from."""
  return tuple((size - 1).bit_length() for size in sizes)


def bytes_of(sizes: Sequence[int]) -> int:
  """Bytes of an item, at least one."""
  return max(1, -(-sum(bits_of(sizes)) // 8))


def check(codes: Int[np.ndarray, "n s"], sizes: Sequence[int]) -> None:
  """Refuses codes that are not there.

  Raises:
    ValueError: naming the first row with one, or if there are more or fewer positions than sizes.
  """
  if codes.ndim != 2 or codes.shape[1] != len(sizes):
    raise ValueError(f"codes: got shape {codes.shape}; allowed: {len(sizes)} codes for each item")
  wrong = (codes < 0) | (codes >= np.asarray(sizes))
  if wrong.any():
    row, position = np.argwhere(wrong)[0]
    raise ValueError(f"row {row}: position {position} has the code {codes[row, position]}; allowed: 0 to "
                     f"{sizes[position] - 1}")  # fmt: skip


def pack(codes: Int[np.ndarray, "n s"], sizes: Sequence[int]) -> UInt8[np.ndarray, "n b"]:
  """Codes as bits.

  Args:
    codes: an item in each row.
    sizes: how many codes each of the s positions has.

  Raises:
    ValueError: as `check`.
  """
  check(codes, sizes)
  out, start = np.zeros((len(codes), bytes_of(sizes)), np.uint8), 0
  for column, bits in zip(codes.T, bits_of(sizes)):
    if bits:
      value = column.astype(np.uint64) << np.uint64(start % 8)
      for number in range(start // 8, (start + bits - 1) // 8 + 1):
        out[:, number] |= (value & np.uint64(255)).astype(np.uint8)
        value >>= np.uint64(8)
    start += bits
  return out


def unpack(packed: UInt8[np.ndarray, "n b"], sizes: Sequence[int]) -> Int[np.ndarray, "n s"]:
  """Inverse of `pack`, int32.

  Raises:
    ValueError: naming the first row with a code that is not there, or with other bits than zeros behind its codes.
  """
  every, start = bits_of(sizes), 0
  if set(every) == {8}:
    out, start = packed.astype(np.int32), 8 * len(every)
  else:
    out = np.empty((len(packed), len(sizes)), np.int32)
    for position, bits in enumerate(every):
      out[:, position] = unpack_one(packed, start, bits)
      start += bits
  check(out, sizes)
  if left := packed.shape[1] * 8 - start:
    rest = packed[:, start // 8 :].astype(np.uint32)
    rest[:, 0] >>= start % 8
    if len(bad := np.flatnonzero(rest.any(axis=1))):
      raise ValueError(f"row {bad[0]}: of the last {left} bits, which are of no code, some are set")
  return out


def unpack_one(packed: UInt8[np.ndarray, "n b"], start: int, bits: int) -> Int[np.ndarray, "n"]:
  """The codes of one position, int32, from bit `start` on."""
  value = np.zeros(len(packed), np.uint64)
  for place, number in enumerate(range(start // 8, (start + bits - 1) // 8 + 1) if bits else ()):
    value |= packed[:, number].astype(np.uint64) << np.uint64(8 * place)
  return ((value >> np.uint64(start % 8)) & np.uint64((1 << bits) - 1)).astype(np.int32)
