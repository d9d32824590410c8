"""Items of a sequence, read ahead of a loop by threads, or by worker processes without JAX and without device."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import threadpoolctl
from absl import logging

_items: Any = None  # in a worker process: the sequence it reads


def ahead(
  items: Any, first: int = 0, *, workers: int = 0, threads: int = 2, stop: int | None = None
) -> Iterator[Any]:
  """`items[first]`, `items[first + 1]` and so on, in this order for any number of threads and workers.

  Closing the iterator ends its threads or workers.

  Args:
    items: has `items[n]` for every n from `first` on, safe to call from several threads; picklable if there are
      workers, which get one copy each.
    first: the first number.
    workers: number of reading processes, with one thread each; 0 reads in this process.
    threads: number of reading threads if there are no workers.
    stop: number after the last; None for no end.

  Raises:
    RuntimeError: if a worker process ends.
    Exception: that of reading an item, when its turn comes.
  """
  if workers:
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads and locks
    pool = ProcessPoolExecutor(workers, context, _begin, (pickle.dumps(items),))
  else:
    pool = ThreadPoolExecutor(threads)
  read, window = (_read, 2 * workers) if workers else (items.__getitem__, 2 * threads)
  try:
    numbers = itertools.count(first) if stop is None else iter(range(first, stop))
    waiting = collections.deque(pool.submit(read, number) for number in itertools.islice(numbers, window))
    while waiting:
      item = waiting.popleft().result()
      waiting.extend(pool.submit(read, number) for number in itertools.islice(numbers, 1))
      yield item
  finally:
    pool.shutdown(cancel_futures=True)


def _begin(pickled: bytes) -> None:
  """Prepares a worker process: no JAX, one BLAS thread, ended by its parent alone."""
  global _items
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a job; the parent still needs batches then
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  os.environ["JAX_PLATFORMS"] = "cpu"
  # Grain uses JAX's tree functions if JAX can be imported, else its own, which it logs.
  absent, verbosity = "jax" not in sys.modules, logging.get_verbosity()
  if absent:
    sys.modules["jax"] = None
  logging.set_verbosity(logging.ERROR)
  _items = pickle.loads(pickled)
  logging.set_verbosity(verbosity)
  if absent:
    del sys.modules["jax"]
  threadpoolctl.threadpool_limits(1)


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()  # also where the parent was killed
  os._exit(1)


def _read(number: int) -> Any:
  return _items[number]
