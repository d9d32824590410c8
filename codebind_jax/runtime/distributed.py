"""Several processes that run one command: start, waiting for each other, work that process 0 does first, one end.

They meet at JAX's coordination service, whose waits have no time limit that work of hours could reach, and go on while
its heartbeats say that all live; collectives of devices give up after as little as half a minute. An error that ends
one process, or a signal, is passed on to all.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from codebind_jax.runtime import rendezvous, signals

HEARTBEAT_SECONDS = 30  # after this silence a process counts as dead, and the others end with an error
START_SECONDS = 45.0  # that a process waits for the others at the start
LIMIT_SECONDS = 24 * 3600.0  # that one waits for the others' work
_SAID_SECONDS = 120.0  # between lines that say so
_SLICE_SECONDS = 2.0  # of one wait, between which signals are handled
_HEARD_SECONDS = 5.0  # that process 0, whose service all use, waits for others to hear why it ends
_PREFIX = "codebind_jax"
_numbers = {kind: itertools.count() for kind in ("gathered", "told")}
_address: tuple[str, int] | None = None  # of process 0
_keep: list[Any] = []  # what C calls
_watching: list[threading.Thread] = []
_line = ""  # what this process is about to end with


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
  seconds: float = START_SECONDS,
) -> None:  # fmt: skip
  """Joins the other processes of this run, before any device is used.

  Settings come from the arguments (flags), else from the environment variables `JAX_COORDINATOR_ADDRESS`,
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else from TPU pods, SLURM or Open MPI. A single process needs none.

  Args:
    coordinator: host:port of process 0.
    num_processes: of all.
    process_id: of this one.
    seconds: that it waits for the others.

  Raises:
    ValueError: if only some of the three are given, or they are wrong; on every process that is there if some are
      missing, or if they do not fit together.
  """
  global _address
  settings = {
    "coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "num_processes": _number(num_processes, "JAX_NUM_PROCESSES"),
    "process_id": _number(process_id, "JAX_PROCESS_ID"),
  }
  missing = [name for name, value in settings.items() if value is None]
  if len(missing) == 3 and not _on_a_cluster():
    return
  if missing and len(missing) < 3:
    raise ValueError(f"--{missing[0]}: not given; allowed: --coordinator, --num_processes and --process_id, or none")
  if not missing:
    rendezvous.meet(*settings.values(), seconds)
    _address = rendezvous.parsed(settings["coordinator"])
  if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it knows SIGTERM and training steps alone
  _explain_aborts()
  jax.distributed.initialize(*settings.values(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  logging.info("process %d of %d, %d of %d devices here", jax.process_index(), jax.process_count(),
               jax.local_device_count(), jax.device_count())
  if jax.process_count() > 1:
    signals.join(_Group())
    for watch in (_watch_errors, _watch_signals):
      _watching.append(threading.Thread(target=watch, args=(_client(),), daemon=True))
      _watching[-1].start()
    atexit.register(_shut_down)
    sys.excepthook = _passing_on(sys.excepthook)


def _number(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if value is not None or not text:
    return value
  try:
    return int(text)
  except ValueError:
    raise ValueError(f"{variable}: got {text!r}; allowed: an integer") from None


def _on_a_cluster() -> bool:
  """Whether the environment says that this process is one of several."""
  several = any((_number(None, name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
  # JAX's import sets the first variable on a Cloud TPU VM, whose metadata names the other workers (its environment does
  # not); the second says that there is no metadata.
  tpu_vm = os.environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in os.environ
  pods = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
  return several or tpu_vm or pods


def _client() -> Any:
  """The coordination service's client, None before `start`; JAX's own functions for several hosts use it so."""
  from jax._src import distributed

  return distributed.global_state.client


def _awaited(client: Any, key: str, what: str) -> str:
  """The value of a key, once another process has set it.

  Raises:
    TimeoutError: after `LIMIT_SECONDS`.
  """
  begun = said = time.monotonic()
  while True:
    if (value := _try_get(client, key, _SLICE_SECONDS)) is not None:
      return value
    now = time.monotonic()
    if now - begun > LIMIT_SECONDS:
      raise TimeoutError(f"waited {(now - begun) / 3600:.0f} hours for {what}")
    if now - said > _SAID_SECONDS:
      logging.info("waiting for %s, for %d minutes by now", what, (now - begun) / 60)
      said = now


def _try_get(client: Any, key: str, seconds: float) -> str | None:
  """The value of a key; None if nobody sets it in time."""
  try:
    return client.blocking_key_value_get(key, round(seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    return None


def _set_once(client: Any, key: str, value: str) -> None:
  """Sets a key unless another process has."""
  try:
    client.key_value_set(key, value)
  except jax.errors.JaxRuntimeError as error:
    if "ALREADY_EXISTS" not in str(error):
      raise


def gathered(value: str, what: str) -> list[str]:
  """What every process gives, by number of the process; waits for all of them.

  Args:
    value: of this process.
    what: it is, for messages and to compare.

  Raises:
    RuntimeError: if another process gives something else.
  """
  if jax.process_count() == 1:
    return [value]
  client, own, key = _client(), jax.process_index(), f"{_PREFIX}/gathered/{next(_numbers['gathered'])}"
  client.key_value_set(f"{key}/{own}", json.dumps([what, value]))
  if own == 0:
    found = [json.loads(_awaited(client, f"{key}/{n}", f"process {n} ({what})")) for n in range(jax.process_count())]
    client.key_value_set(f"{key}/all", json.dumps(found))
  found = json.loads(_awaited(client, f"{key}/all", f"all processes ({what})"))
  for number, (other, _) in enumerate(found):
    if other != what:
      raise RuntimeError(f"process {number} is at {other!r}, process {own} at {what!r}: they do not do the same")
  return [value for _, value in found]


def wait_for_all(name: str) -> None:
  """Waits until every process has called it."""
  gathered("", name)


def _from_first(value: str, what: str) -> str:
  """The value that process 0 gives."""
  if jax.process_count() == 1:
    return value
  client, key = _client(), f"{_PREFIX}/told/{next(_numbers['told'])}"
  if jax.process_index() == 0:
    client.key_value_set(key, value)
    return value
  return _awaited(client, key, f"process 0 ({what})")


@contextlib.contextmanager
def process_0_first(what: str = "data") -> Iterator[None]:
  """Process 0 runs the body before the others, which then find its results in the cache on a shared disk.

  Args:
    what: the body makes, for the line in the log while the others wait.
  """
  if jax.process_index() > 0:
    _from_first("", what)
  yield
  if jax.process_index() == 0:
    _from_first("", what)


def interleaved(own: np.ndarray, count: int, processes: int) -> np.ndarray:
  """Rows that every process has a part of, in order: process p of P gives rows p, p + P, ...

  Args:
    own: this process's rows, [m, ...] of at most 64-bit numbers.
    count: of all rows.
    processes: P, all or this one alone.
  """
  if processes == 1:
    return own
  wait_for_all("rows")  # made in very different times
  padded = np.zeros((-(-count // processes), *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  # Bytes, since JAX would cut 64-bit numbers to 32.
  gathered = np.asarray(multihost_utils.process_allgather(padded.view(np.uint8)))
  whole = gathered.reshape(processes, *padded.view(np.uint8).shape).view(own.dtype)
  return np.swapaxes(whole, 0, 1).reshape(-1, *own.shape[1:])[:count]


def agreed(value: bool) -> bool:
  """The value that process 0 gives."""
  return bool(_from_first("1" if value else "", "a decision"))


class _Group:
  """The other processes, for `signals`."""

  def announce(self, told: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _set_once(_client(), f"{_PREFIX}/signal", json.dumps([jax.process_index(), told]))

  def last_point(self, point: int | None) -> int | None:
    client, own = _client(), jax.process_index()
    try:
      _set_once(client, f"{_PREFIX}/point/{own}", json.dumps(point))
      if own == 0:
        found = [_try_get(client, f"{_PREFIX}/point/{n}", HEARTBEAT_SECONDS) for n in range(jax.process_count())]
        points = [json.loads(one) if one else None for one in found]
        client.key_value_set(f"{_PREFIX}/last_point", json.dumps(None if None in points else max(points) + 1))
      return json.loads(_try_get(client, f"{_PREFIX}/last_point", 2.0 * HEARTBEAT_SECONDS) or "null")
    except jax.errors.JaxRuntimeError:
      return None


def _watch_signals(client: Any) -> None:
  """The thread that hears that another process was told to end."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended
    while not (found := _try_get(client, f"{_PREFIX}/signal", 3600.0)):
      pass
    number, told = json.loads(found)
    if number != jax.process_index():
      signals.tell(f"{told} of process {number}", 1 if told == signals.INTERRUPT else None)


def _watch_errors(client: Any) -> None:
  """The thread that hears that another process has ended with an error, and ends this one."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    while not (found := _try_get(client, f"{_PREFIX}/ended", 3600.0)):
      pass
    number, line = json.loads(found)
    if number != jax.process_index():
      _end_all(client, f"process {number} ended: {line}")


def _end_all(client: Any, line: str) -> NoReturn:
  """Ends this process, as others do; process 0, whose service they use, after them."""
  global _line
  _line = line
  _last_of_all(client, "heard", _HEARD_SECONDS)
  signals.end(line, 1)


def _last_of_all(client: Any, what: str, seconds: float) -> None:
  """Says that this process is about to end; process 0, whose service all use, waits until all do."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _set_once(client, f"{_PREFIX}/{what}/{jax.process_index()}", "")
    if jax.process_index() == 0:
      deadline = time.monotonic() + seconds
      for other in range(1, jax.process_count()):
        _try_get(client, f"{_PREFIX}/{what}/{other}", max(deadline - time.monotonic(), 0.01))
      time.sleep(0.5)  # for what they do between saying so and their end


def leave(line: str) -> None:
  """Ends all processes because of an error of this one; does nothing for a single process.

  Args:
    line: what it was, for stderr here, and after "process N ended: " on the others.
  """
  client = _client()
  if client is None or jax.process_count() == 1:
    return
  own = jax.process_index()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _set_once(client, f"{_PREFIX}/ended", json.dumps([own, line]))
    number, first = json.loads(_try_get(client, f"{_PREFIX}/ended", 1.0) or json.dumps([own, line]))
    if number != own:  # whose end may well have caused the error
      line = f"process {number} ended: {first}"
  _end_all(client, line)


def lost(error: BaseException) -> bool:
  """Whether an error says that the connection to another process broke off."""
  told = ("Gloo", "gloo", "Connection reset", "Connection closed", "UNAVAILABLE", "NCCL")
  several = _client() is not None and jax.process_count() > 1
  return several and isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in told)


def part(line: str, code: int) -> None:
  """Ends this process, which was told to end as all others were; does nothing for a single one.

  Args:
    line: for stderr.
    code: exit code.
  """
  client = _client()
  if client is None or jax.process_count() == 1:
    return
  _last_of_all(client, "parted", signals.GRACE)
  signals.end(line, code)


def finish() -> None:
  """The end of a command without errors: waits for all processes, which else would be taken for dead."""
  if _client() is not None:
    wait_for_all("the end")
    _shut_down()


def _shut_down() -> None:
  signals.join(None)
  if _client() is not None:
    jax.distributed.shutdown()
  for watch in _watching:
    watch.join(_HEARD_SECONDS)


def _passing_on(hook: Any) -> Any:
  """An exception hook that also ends the other processes."""

  def passing_on(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    hook(kind, error, trace)
    leave(f"error: {kind.__name__}: {error}")

  return passing_on


def _explain_aborts() -> None:
  """Ends what JAX aborts, since another process has died, with a line that says so and exit code 1."""

  def explain(_: int) -> NoReturn:
    if _line:
      signals.end(_line, 1)
    if signals.told():  # as the others were, which have ended
      signals.end(f"stopped by {signals.told()}; the same command goes on", signals.exit_code())
    gone = _address is not None and not _answers(*_address)
    which = "process 0" if gone else "another process of this run (JAX names it above)"
    signals.end(f"error: {which} has died or cannot be reached; the same command goes on from the last checkpoint", 1)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
  _keep.append(handler)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _answers(host: str, port: int) -> bool:
  try:
    with socket.create_connection((host, port), timeout=2.0):
      return True
  except OSError:
    return False
