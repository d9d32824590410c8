"""Items of a sequence, read ahead of a loop by threads, or by worker processes without JAX and without device."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import threadpoolctl
from absl import logging
from jaxtyping import Shaped

from codebind_jax.data.blocks import Block

_items: Any = None  # in a worker process: the sequence it reads
_blocks: list[Block] = []  # in a worker process: what its items are written to
_block: Block | None = None  # in a worker process: that of the item it reads
_reading = threading.local()  # `pool`, and how many `threads` of it read the parts of this thread's item
_LOOK = 5.0  # seconds of waiting for a worker's item after which the workers are looked at
_SPARE = 4  # blocks beside those of items that are being read: of items in use


class WorkerKilled(RuntimeError):
  """A worker process ended before its work."""


def ahead(
  items: Any, first: int = 0, *, workers: int = 0, threads: int = 2, stop: int | None = None, parts: bool = False
) -> Iterator[Any]:
  """`items[first]`, `items[first + 1]` and so on, in this order for any number of threads and workers.

  Closing the iterator ends its threads or workers. Arrays of workers' items lie in memory shared with them, which is
  used again once an item's arrays are gone; if the loop keeps many items, further ones are copied through a pipe.

  Args:
    items: has `items[n]` for every n from `first` on, safe to call from several threads; picklable if there are
      workers, which get one copy each.
    first: the first number.
    workers: number of reading processes; 0 reads in this process.
    threads: number of reading threads: of each process if they read parts, else only if there are no workers.
    stop: number after the last; None for no end.
    parts: the threads read parts of an item, what `spread` is called with, and two items at a time in each process;
      otherwise each reads an item.

  Raises:
    WorkerKilled: if a worker process ends; what it and the others were reading is lost.
    Exception: that of reading an item, when its turn comes.
  """
  inner = ThreadPoolExecutor(threads) if parts and threads > 1 and not workers else None
  own = min(threads, 2) if parts else threads
  window, blocks = 2 * (workers or own), []
  if workers:
    blocks = [Block() for _ in range(window + _SPARE)]
    pool = _Workers(workers, (pickle.dumps(items), blocks, threads if parts else 1))
  else:
    pool = ThreadPoolExecutor(own, initializer=_use, initargs=(inner, threads))
  free = list(range(len(blocks)))

  def submit(number: int) -> tuple[Future, int | None]:
    if not workers:
      return pool.submit(items.__getitem__, number), None
    block = free.pop() if free else None
    return pool.submit(_read, number, block), block

  try:
    numbers = itertools.count(first) if stop is None else iter(range(first, stop))
    waiting = collections.deque(submit(number) for number in itertools.islice(numbers, window))
    while waiting:
      future, block = waiting.popleft()
      item = pool.result(future) if workers else future.result()
      if block is not None:
        item, whole = blocks[block].loads(*item)
        weakref.finalize(whole, free.append, block).atexit = False
        del whole
      waiting.extend(submit(number) for number in itertools.islice(numbers, 1))
      yield item
      del item
  finally:
    pool.shutdown(cancel_futures=True)
    if inner:
      inner.shutdown()
    for block in blocks:
      block.close()


class _Workers:
  """A pool of processes that is not waited for in vain once one of them is killed.

  Where that one held a lock of the pool's queues, or was in the middle of an answer, the pool alone waits for ever.
  """

  def __init__(self, count: int, start: tuple[Any, ...]):
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads and locks
    try:
      self._pool = ProcessPoolExecutor(count, context, _begin, start)
    except OSError as error:
      raise OSError(error.errno, f"no semaphores for worker processes ({error.strerror}); make room, or read without "
                    "(config.data.workers=0)", "/dev/shm") from error  # fmt: skip
    self._processes, self._answers, self._thread = self._pool._processes, self._pool._result_queue, None

  def submit(self, work: Callable[..., Any], *args: Any) -> Future:
    try:
      future = self._pool.submit(work, *args)
    except BrokenExecutor as error:
      raise self._killed() from error
    self._thread = self._pool._executor_manager_thread
    return future

  def result(self, future: Future) -> Any:
    """What was submitted gives; a WorkerKilled error where a process has ended."""
    while not wait([future], _LOOK).done:
      if self._lost() and not wait([future], _LOOK).done:
        raise self._killed()
    try:
      return future.result()
    except BrokenExecutor as error:
      raise self._killed() from error

  def shutdown(self, cancel_futures: bool) -> None:
    """Ends the processes, as soon as they have finished what they are doing."""
    self._pool.shutdown(wait=False, cancel_futures=cancel_futures)
    while self._thread and self._thread.is_alive():
      self._thread.join(0.1)
      if self._lost():
        self._kill()
    self._answers.close()

  def _lost(self) -> list[int]:
    """Exit codes of the processes that have ended before their work."""
    return [process.exitcode for process in list(self._processes.values()) if process.exitcode]

  def _kill(self) -> None:
    for process in list(self._processes.values()):
      process.kill()
    if not self._answers._writer.closed:
      self._answers._writer.close()  # the last one: a thread that waits for the rest of an answer reads an end

  def _killed(self) -> WorkerKilled:
    """The error, with how a process ended; the others are killed."""
    for process in list(self._processes.values()):
      process.join(0.1)
    lost = sorted(self._lost(), key=lambda code: code == -signal.SIGTERM)  # which the pool sends to the others
    self._kill()
    code = lost[0] if lost else 0
    advice = ("free memory, or use fewer workers (config.data.workers, --workers)" if code == -signal.SIGKILL else
              "without workers (config.data.workers=0, --workers=1) this process reads, and shows why")  # fmt: skip
    return WorkerKilled(f"one of {len(self._processes)} worker processes {ended(code)}; {advice}")


def ended(code: int) -> str:
  """How a process ended, by its exit code, and what that may mean."""
  if code == -signal.SIGKILL:
    return "was killed by SIGKILL, as the system does where memory is short"
  return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def spread(read: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
  """`[read(thing) for thing in things]`, by the threads of this process that read parts, if it has some."""
  pool = getattr(_reading, "pool", None)
  if pool is None:
    return [read(thing) for thing in things]
  out, numbers = [None] * len(things), iter(range(len(things)))

  def work() -> None:
    for number in numbers:  # the threads share it
      out[number] = read(things[number])

  working = [pool.submit(work) for _ in range(min(_reading.threads, len(things)))]
  try:
    for future in working:
      future.result()
  finally:
    collections.deque(numbers, maxlen=0)
    wait(working)
  return out


def empty(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
  """An array of any content, for the item that is being read: in a worker process, in shared memory."""
  return _block.empty(shape, dtype) if _block is not None else np.empty(shape, dtype)


def _use(pool: ThreadPoolExecutor | None, threads: int) -> None:
  _reading.pool, _reading.threads = pool, threads


def _begin(pickled: bytes, blocks: list[Block], threads: int) -> None:
  """Prepares a worker process: no JAX, one BLAS thread, ended by its parent alone."""
  global _items, _blocks
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a job; the parent still needs batches then
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  os.environ["JAX_PLATFORMS"] = "cpu"
  # Grain uses JAX's tree functions if JAX can be imported, else its own, which it logs.
  absent, verbosity = "jax" not in sys.modules, logging.get_verbosity()
  if absent:
    sys.modules["jax"] = None
  logging.set_verbosity(logging.ERROR)
  try:
    _items = pickle.loads(pickled)
  except Exception as error:  # raised where it is heard
    _items = _Failed(error)
  logging.set_verbosity(verbosity)
  if absent:
    del sys.modules["jax"]
  _blocks = blocks
  _use(ThreadPoolExecutor(threads) if threads > 1 else None, threads)
  threadpoolctl.threadpool_limits(1)


@dataclasses.dataclass(frozen=True)
class _Failed:
  """What cannot be read at all."""

  error: Exception

  def __getitem__(self, number: int) -> Any:
    raise self.error


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()  # also where the parent was killed
  os._exit(1)


def _read(number: int, block: int | None) -> Any:
  """An item, or its pickle and where its arrays are in the block."""
  global _block
  if block is None:
    return _items[number]
  _block = _blocks[block]
  _block.clear()
  try:
    return _block.dumps(_items[number])
  finally:
    _block = None
