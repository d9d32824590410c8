"""Metrics on disk (`metrics.jsonl` and TensorBoard event files), and the throughput of a training loop."""

import contextlib
import io
import json
import math
import os
import pathlib
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from codebind_jax import files

FILE = "metrics.jsonl"
_RESERVED = ("step", "stage", "warning")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a metrics file.

  A last line that was cut short, as by a kill, is left out and named in the log. The lines that `MetricsWriter` writes
  carry checksums, see `files.sealed_line`, and are verified.

  Args:
    path: `metrics.jsonl` or the folder it lies in.

  Returns:
    One dict a line: `step`, `stage` and metrics by name; a value that was not finite (null in the file) is NaN.

  Raises:
    ValueError: if any other line is damaged, or is not a JSON object with a step, naming file and line.
  """
  path = files.path(path)
  path = path / FILE if files.is_folder(path) else path
  records, _ = _parse(path)
  return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def _parse(path, copy=None):
  """(records of a file, their number of bytes), without a partial last line; read from its local copy if there is one.
  """
  records, size = [], 0
  lines = _lines(files.read_bytes(copy or path))
  for number, line in enumerate(lines, 1):
    try:
      record = files.from_json(files.unsealed_line(line.removesuffix(b"\n"), f"{path}:{number}"), "line")
      if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError('expected an object with an integer "step"')
    except ValueError as error:
      if number == len(lines) and not line.endswith(b"\n") and not _whole(line[:-1]):
        logging.warning("%s:%d: the last line is cut short and was dropped (%d bytes)", path, number, len(line))
        break
      raise ValueError(f"{path}:{number}: not a line of metrics: {error}; got {line[:80]!r}") from error
    records.append(record)
    size += len(line)
  return records, size


def _lines(content: bytes) -> list[bytes]:
  """Lines with their ends, which are line feeds alone."""
  return io.BytesIO(content).readlines()


def _whole(line: bytes) -> bool:
  """Whether a line has its whole checksum: what follows is then its end, damaged, and not its rest, cut short."""
  try:
    return files.unsealed_line(line, "") != line
  except ValueError:
    return False


class _Appended:
  """A file that grows by whole pieces, also on a full disk: what did not fit is taken back, and named.

  Args:
    path: of the file, made where it is not there.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    with files.writing(path):
      self._file = open(path, "ab", buffering=0)
      self._size = self._file.seek(0, os.SEEK_END)

  @property
  def closed(self) -> bool:
    return self._file.closed

  def add(self, piece: bytes) -> None:
    """Appends a piece.

    Raises:
      OSError: naming the file, if there is no room for it.
    """
    with files.writing(self._path):
      try:
        written = 0
        while written < len(piece):
          written += self._file.write(piece[written:])
      except BaseException:
        with contextlib.suppress(OSError):
          self._file.truncate(self._size)
        raise
    self._size += len(piece)

  def sync(self) -> None:
    """Returns when the disk has it all."""
    with files.writing(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class _Events:
  """An event file of TensorBoard, written without the queue and the thread of tensorboardX's own writer.

  That thread ends at a full disk, unseen, and whoever adds to its queue then waits for ever.
  """

  def __init__(self, folder: pathlib.Path, suffix: str, purge_step: int | None):
    with files.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    self._file = _Appended(folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}{suffix}")
    self._add([Event(file_version="brain.Event:2")])
    if purge_step is not None:
      self._add([Event(step=purge_step, file_version="brain.Event:2"),
                 Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))])  # fmt: skip

  def _add(self, events: Iterable[Event]) -> None:
    records = b""
    for event in events:
      event.wall_time = time.time()
      content = event.SerializeToString()
      head = struct.pack("<Q", len(content))
      records += head + struct.pack("<I", masked_crc32c(head)) + content + struct.pack("<I", masked_crc32c(content))
    self._file.add(records)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._add([Event(step=step, summary=summary.scalar(name, value)) for name, value in values.items()])

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._add([Event(step=step, summary=summary.image(name, image, dataformats="HWC"))])

  def sync(self) -> None:
    self._file.sync()

  def close(self) -> None:
    self._file.close()


class MetricsWriter:
  """Appends metrics to `DIR/metrics.jsonl` and to TensorBoard files in `DIR/tensorboard`.

  Steps are global: they grow over all stages. Lines are in the order written and floats keep all digits, so a run that
  was killed and resumed (with `truncate` to the restored step) leaves the same lines as one that was never stopped. For
  that, write the metrics of a step before its checkpoint, and call `flush` in between. The checksum of a line is the
  blanks at its end, so that the objects are those of step, stage and metrics alone.

  Far disks cannot append: there a local copy is written, which `flush` uploads whole, and TensorBoard's files with it.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsWriter(folder, tensorboard=False) as writer:
    ...   writer.write(10, "stage1", {"train/info_nce": 2.5})
    >>> read_metrics(folder)
    [{'step': 10, 'stage': 'stage1', 'train/info_nce': 2.5}]
  """

  def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = True, active: bool = True):
    """Opens the files for appending; a last line cut short by a kill is removed first.

    Args:
      workdir: folder of the run, made if it is not there.
      tensorboard: also write event files.
      active: False makes every method do nothing, for all processes of a run but the first.

    Raises:
      ValueError: if there is a metrics file with a line that is not one of metrics.
    """
    self.path = files.path(workdir) / FILE
    self._scratch: pathlib.Path | None = None
    self._active, self._use_events, self._events, self._purge_step = active, tensorboard, None, None
    self._file = None
    if active:
      files.make_folder(self.path.parent)
      if files.is_far(self.path):
        self._scratch = files.make_scratch()
        if files.is_file(self.path):
          files.download(self.path, self._scratch / FILE)
      self._local = self._scratch / FILE if self._scratch else self.path
      self._there: dict[str, int] = {}  # names of the local files -> sizes when they were uploaded
      self._mend()
      self._file = _Appended(self._local)

  def _mend(self):
    if not self._local.exists():
      return
    _, size = _parse(self.path, self._local)
    data = self._local.read_bytes()
    lines = data[:size]
    if lines and not lines.endswith(b"\n"):
      lines += b"\n"
    if lines != data:
      files.write_whole(self._local, lines.decode())

  def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
    """Writes one line, and one TensorBoard scalar a metric.

    Args:
      step: global step.
      stage: name of the stage.
      metrics: numbers by flat name (`train/info_nce`); Python, numpy or JAX scalars. A value that is not finite is
        written as null and named under `warning` in the same line.

    Raises:
      ValueError: if a name is reserved or a value is not one number, naming it.
      OSError: naming the file, if the disk is full: the file then ends with the line before.
    """
    if not self._active:
      return
    line: dict[str, Any] = {"step": int(step), "stage": str(stage)}
    not_finite = []
    for name, value in metrics.items():
      number = _number(name, value)
      if not math.isfinite(number):
        not_finite.append(f"{name}={number}")
      line[name] = number if math.isfinite(number) else None
    if not_finite:
      line["warning"] = "not finite: " + ", ".join(not_finite)
      logging.warning("step %d: %s", step, line["warning"])
    self._file.add((files.sealed_line(json.dumps(line, allow_nan=False)) + "\n").encode())
    if self._use_events:
      self._event_writer().scalars(
        int(step), {name: math.nan if line[name] is None else line[name] for name in metrics})  # fmt: skip

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes an image [h, w, 3] uint8 to TensorBoard."""
    if self._active and self._use_events:
      self._event_writer().image(int(step), name, image)

  def _event_writer(self):
    if self._events is None:
      # Event files are named by the second they were made in; the count keeps one run from overwriting the last.
      named = lambda place: {path.name for path in files.children(place / "tensorboard", "events.out.tfevents.*")}
      count, folder = len(named(self.path.parent) | named(self._local.parent)), self._local.parent / "tensorboard"
      self._events = _Events(folder, f".{count:04d}", self._purge_step)
    return self._events

  def truncate(self, step: int) -> None:
    """Removes all metrics of later steps, for a run that resumes at this one.

    Lines of a later step are dropped in one atomic replacement; TensorBoard hides later events (`purge_step`).

    Args:
      step: the restored step; its own lines stay.
    """
    if not self._active:
      return
    self._file.close()
    records, _ = _parse(self.path, self._local)
    dropped = sum(record["step"] > step for record in records)
    if dropped:
      logging.info("%s: dropped %d lines after step %d", self.path, dropped, step)
      kept = [line for line, record in zip(_lines(self._local.read_bytes()), records) if record["step"] <= step]
      files.write_whole(self._local, b"".join(kept).decode())
      if self._scratch:
        files.upload(self._local, self.path)
    self._file = _Appended(self._local)
    if self._events is not None:
      self._events.close()
      self._events = None
    self._purge_step = step + 1

  def flush(self) -> None:
    """Returns when all metrics are on the disk."""
    if not self._active:
      return
    self._file.sync()
    if self._events is not None:
      self._events.sync()
    if self._scratch:
      for name, found in files.contents(self._scratch).items():
        if self._there.get(name) != found.size:
          files.upload(self._scratch / name, self.path.parent / name)
          self._there[name] = found.size

  def close(self) -> None:
    """Flushes and closes all files; calling it again does nothing."""
    if not self._active or self._file.closed:
      return
    try:
      self.flush()
    finally:
      self._file.close()
      if self._events is not None:
        self._events.close()
      if self._scratch:
        shutil.rmtree(self._scratch, ignore_errors=True)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *error) -> None:
    self.close()


def _number(name, value):
  if not isinstance(name, str) or not name or name in _RESERVED:
    raise ValueError(f"metric name {name!r}: a non-empty string other than {', '.join(_RESERVED)} is needed")
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
    raise ValueError(f"metric {name!r}: one number is needed, got {array.dtype} of shape {array.shape}")
  return array.item() if array.dtype.kind in "iu" else float(array.reshape(()))


class Throughput:
  """Examples a second, and the share of time in which the device waited for data.

  The loop runs ahead of the device, so that reading a batch while an earlier step still runs does not count as waiting.

  Example:
    >>> ticks = iter([0.0, 1.0, 1.5, 4.0, 4.0])
    >>> rate = Throughput(clock=lambda: next(ticks))   # 0.0
    >>> with rate.waiting():                           # 1.0 to 1.5
    ...   batch = "the next one"
    >>> rate.add(8)
    >>> rate.report()                                  # 4.0
    {'examples_per_second': 2.0, 'data_wait_share': 0.125}
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    """Starts the count.

    Args:
      clock: gives seconds, monotonically.
    """
    self._clock = clock
    self.waited = 0.0  # seconds in all, over restarts
    self.restart()

  @contextlib.contextmanager
  def waiting(self, last: Any = None) -> Iterator[None]:
    """Counts the body's time as waiting for data, unless the last step still runs at its end.

    Args:
      last: an output of the last step; without one the time always counts.
    """
    start = self._clock()
    try:
      yield
    finally:
      if last is None or last.is_ready():
        waited = self._clock() - start
        self._waited += waited
        self.waited += waited

  def add(self, examples: int) -> None:
    """Counts trained examples."""
    self._examples += examples

  def read(self, items: Mapping[str, int], bytes_read: Mapping[str, int], seconds: Mapping[str, float]) -> None:
    """Counts what this process read.

    Args:
      items: source -> rows.
      bytes_read: source -> bytes of their files.
      seconds: modality -> time of reading and preparing, summed over threads and workers.
    """
    for total, new in ((self._items, items), (self._bytes, bytes_read), (self._seconds, seconds)):
      for name, value in new.items():
        total[name] = total.get(name, 0) + value

  def restart(self) -> None:
    """Starts the count anew, after a compilation, an evaluation or a checkpoint, whose time does not belong to it."""
    self._start, self._waited, self._examples = self._clock(), 0.0, 0
    self._items: dict[str, float] = {}
    self._bytes: dict[str, float] = {}
    self._seconds: dict[str, float] = {}

  def report(self) -> dict[str, float]:
    """Rates since the last report or restart; call it after the last step's output is ready, as steps run ahead.

    Of this process: `data/SOURCE/items_per_second`, `data/SOURCE/bytes_per_second`, and `data/MODALITY/read_share`, the
    time of reading and preparing it as a share of the time that passed (2 keeps two threads or workers busy).
    """
    elapsed = max(self._clock() - self._start, 1e-9)
    rates = {"examples_per_second": self._examples / elapsed, "data_wait_share": self._waited / elapsed}
    rates |= {f"data/{name}/items_per_second": value / elapsed for name, value in self._items.items()}
    rates |= {f"data/{name}/bytes_per_second": value / elapsed for name, value in self._bytes.items()}
    rates |= {f"data/{name}/read_share": value / elapsed for name, value in self._seconds.items()}
    self.restart()
    return rates


class Phases:
  """Where the time of a command goes, by phase.

  A phase inside another stops the outer one's count, so that the phases add up; one that is entered again goes on.

  Example:
    >>> ticks = iter([0.0, 5.0, 8.0, 9.0])
    >>> phases = Phases(clock=lambda: next(ticks))
    >>> with phases("training"):     # 0 to 5, 8 to 9
    ...   with phases("evaluation"): # 5 to 8
    ...     pass
    >>> phases.seconds
    {'training': 6.0, 'evaluation': 3.0}

  Attributes:
    seconds: phase -> time, in the order in which they began.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self.seconds: dict[str, float] = {}
    self._clock, self._open, self._last = clock, [], 0.0

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Counts the body's time under a name."""
    self._count()
    self._open.append(name)
    self.seconds.setdefault(name, 0.0)
    try:
      yield
    finally:
      self._count()
      self._open.pop()

  def _count(self) -> None:
    now = self._clock()
    if self._open:
      self.seconds[self._open[-1]] += now - self._last
    self._last = now


def input_bound(rates: Mapping[str, float], workers: int, threads: int, share: float = 0.1) -> str:
  """What to change where a loop waits for its data; "" where it waits less than `share` of the time.

  Args:
    rates: as of `Throughput.report`.
    workers, threads: of the config's section `data`.
    share: from which a loop counts as input-bound.
  """
  waited = rates.get("data_wait_share", 0.0)
  if waited <= share:
    return ""
  costs = {name.split("/")[1]: value for name, value in rates.items() if name.endswith("/read_share")}
  total = max(sum(costs.values()), 1e-9)
  parts = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in sorted(costs.items(), key=lambda x: -x[1]))
  busy = total / max(workers or threads, 1)
  now = f"workers {workers}" if workers else f"threads {threads}, workers 0"
  if busy < 0.5:
    advice = "most of that is waiting for the disk: raise config.data.threads or workers, or copy the data nearer"
  else:
    advice = "raise config.data.workers to the number of free cores, store smaller files, or cache a frozen trunk"
  return f"input-bound: waited {100 * waited:.0f} % of the time for data ({now}; reading: {parts}); {advice}"
