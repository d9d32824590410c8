"""SentencePiece models, unigram and BPE, as a `tokenizers.Tokenizer`: the file is read here, without the library.

The file is a protocol buffer (sentencepiece_model.proto): pieces with score and type, the trainer's and the
normaliser's settings.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2
_BLANK = "\u2581"


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
    if byte < 128:
      return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(number, value) of the fields of one message: integers of varints, bytes of the others."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
      yield key >> 3, value
      continue
    length = {1: 8, 5: 4}.get(kind)
    if kind == 2:
      length, at = _varint(data, at)
    if length is None or at + length > len(data):
      raise ValueError("no protocol buffer")
    yield key >> 3, data[at : at + length]
    at += length


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
  """Pairs that make a piece, the piece with the highest score first."""
  number = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
  ranked = []
  for piece, i in number.items():
    for cut in range(1, len(piece)):
      if piece[:cut] in number and piece[cut:] in number:
        ranked.append((-pieces[i][1], i, piece[:cut], piece[cut:]))
  return [pair[2:] for pair in sorted(ranked)]


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a model file; it adds no marks.

  Raises:
    ValueError: naming the file, if it is no SentencePiece model, or one of words or characters.
  """
  try:
    pieces, trainer, normaliser = [], {}, {}
    for number, value in _fields(path.read_bytes()):
      if number == 1:
        piece = dict(_fields(value))
        pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, _NORMAL)))
      elif number == 2:
        trainer = dict(_fields(value))
      elif number == 3:
        normaliser = dict(_fields(value))
    unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN)
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration, struct.error) as error:
    raise ValueError(f"{path}: not a SentencePiece model, or damaged ({error!r})") from error
  kind, bytes_too = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
  user = [piece for piece, _, type_ in pieces if type_ == _USER]
  if kind == _UNIGRAM:
    model = models.Unigram([(piece, score) for piece, score, _ in pieces], unknown, bytes_too)
  elif kind == _BPE:
    model = models.BPE(
      {piece: i for i, (piece, _, _) in enumerate(pieces)}, _merges(pieces), unk_token=pieces[unknown][0],
      fuse_unk=True, byte_fallback=bytes_too, ignore_merges=bool(user),
    )  # fmt: skip
  else:
    raise ValueError(f"{path}: a SentencePiece model of kind {kind} is not supported; allowed: unigram, BPE")
  made, steps = tokenizers.Tokenizer(model), []
  if normaliser.get(2):
    steps.append(normalizers.Precompiled(normaliser[2]))
  if normaliser.get(4, 1):
    steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
  if normaliser.get(3, 1):
    steps.append(normalizers.Prepend(" "))
  if normaliser.get(5, 1):
    steps.append(normalizers.Replace(" ", _BLANK))
  made.normalizer = normalizers.Sequence(steps)
  if user:  # found whole, the longest first, and never merged
    pattern = "|".join(re.escape(piece) for piece in sorted(user, key=len, reverse=True))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
  made.add_special_tokens([AddedToken(p, normalized=False) for p, _, type_ in pieces if type_ == _CONTROL])
  return made
