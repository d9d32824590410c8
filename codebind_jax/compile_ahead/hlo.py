"""Reading a compiled program: how often every line runs, what it costs and what it sends to other devices.

XLA's own `cost_analysis()` counts the body of a loop once. Here a body counts as often as the loop's condition lets it
run; a loop whose condition compares with no constant counts once and is reported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import NamedTuple

_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
                "collective-broadcast")


class Line(NamedTuple):
  """One operation: its name, the text of its type, the operation, and the rest of the line."""

  name: str
  type: str
  operation: str
  rest: str


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the collectives of one kind move over a step.

  Attributes:
    static: operations in the program.
    runs: operations run, loops counted.
    bytes: of their results, on one device, loops counted.
  """

  static: int
  runs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
  """Costs of one step on one device.

  Attributes:
    traffic: kind of collective -> Traffic.
    cycles: the compiler's estimate for everything but collectives, loops counted; 0 where it gives none (CPU).
    uncounted: names of loops whose number of trips is not in the text; they count once.
  """

  traffic: dict[str, Traffic]
  cycles: int
  uncounted: tuple[str, ...]


def size_of(text: str) -> int:
  """Bytes of the arrays in the text of a type, such as `(f32[8,128]{1,0}, pred[])`."""
  return sum(_width(kind) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in _SHAPE.findall(text))


def _width(kind: str) -> int:
  bits = re.search(r"\d+", kind)
  return max(1, int(bits[0]) // 8) if bits else 1


def computations(text: str) -> tuple[dict[str, list[Line]], str]:
  """Lines of every computation of an HLO module by its name, and the name of the entry."""
  lines: dict[str, list[Line]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = lines.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _LINE.match(line)):
      current.append(Line(*match.groups()))
  return lines, entry


def _called(rest: str, key: str) -> str:
  return re.search(rf"{key}=%?([\w.\-]+)", rest)[1]


def trips(condition: list[Line], every: dict[str, list[Line]]) -> int | None:
  """Number of trips of a loop: the constant that its condition compares the counter with; None without one."""
  constants = []
  for line in condition:
    if line.operation == "constant" and line.type.startswith(("s32[]", "u32[]", "s64[]")):
      constants.append(int(re.match(r"-?\d+", line.rest)[0]))
    elif line.operation == "fusion":
      inner = trips(every[_called(line.rest, "calls")], every)
      constants += [] if inner is None else [inner]
  return max(constants) if constants else None


def read(text: str) -> Program:
  """Costs of a compiled step from its HLO text (`compiled.as_text()`)."""
  every, entry = computations(text)
  static, runs, moved, uncounted = defaultdict(int), defaultdict(int), defaultdict(int), []
  cycles = 0

  def visit(name: str, times: int) -> None:
    nonlocal cycles
    for line in every[name]:
      kind = line.operation.removesuffix("-start")
      if kind in _COLLECTIVES:
        static[kind] += 1
        runs[kind] += times
        moved[kind] += times * _result(line)
      elif estimate := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
        cycles += times * int(estimate[1])
      if line.operation == "while":
        trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest)
        number = int(trip_count[1]) if trip_count else trips(every[_called(line.rest, "condition")], every)
        if number is None:
          uncounted.append(line.name)
        visit(_called(line.rest, "body"), times * (1 if number is None else number))
      elif line.operation in ("call", "async-start"):
        key = "to_apply" if "to_apply=" in line.rest else "calls"
        if key + "=" in line.rest:
          visit(_called(line.rest, key), times)
      elif line.operation == "conditional":
        for branch in re.findall(r"%([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", line.rest)[1]):
          visit(branch, times)

  visit(entry, 1)
  traffic = {kind: Traffic(static[kind], runs[kind], moved[kind]) for kind in sorted(static)}
  return Program(traffic, cycles, tuple(uncounted))


def _result(line: Line) -> int:
  """Bytes of a collective's results; the type of an asynchronous start also holds operands (first) and flags (last)."""
  if not line.operation.endswith("-start"):
    return size_of(line.type)
  if line.operation == "all-reduce-start":
    return size_of(line.type)
  parts = _split(line.type)
  return size_of(parts[1]) if len(parts) > 1 else size_of(line.type)


def _split(text: str) -> list[str]:
  """The parts of a tuple's type."""
  if not text.startswith("("):
    return [text]
  parts, depth, current = [], 0, ""
  for letter in text[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      parts.append(current.strip())
      current = ""
    else:
      current += letter
  return [*parts, current.strip()]
