"""SIGTERM and Ctrl-C: a command ends in order wherever it is, with what it learnt saved, and the same command goes on.

Where nothing is to be saved, the main thread leaves by `Preempted` at once, and after `GRACE` seconds, as inside a
compiler, the process ends without it. In a `saving` section the run ends at a point that it asks at (`reached`), after
a step or a batch of an evaluation, the same one in all processes. Whoever is told twice ends at once.

A thread hears of a signal by Python's wakeup descriptor, also while the main thread is in compiled code, where Python's
own handlers wait. The module imports nothing slow, so that a command can begin with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

GRACE = 10.0  # seconds that the main thread has for leaving where nothing is to be saved
# Seconds in which a signal that comes again is the same one: launchers pass on what the processes got too.
REPEATED = {signal.SIGTERM: 1.0, signal.SIGINT: 0.25}
STOPPED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT  # exit codes, as a shell's
INTERRUPT = "Ctrl-C"
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: INTERRUPT}
_WAKE = signal.SIGURG  # which does nothing where no handler is


class Preempted(BaseException):
  """SIGTERM or Ctrl-C has ended the command, whose state is saved; the same command goes on.

  No `Exception`, so that nothing that counts bad records takes it for one.
  """


@runtime_checkable
class Group(Protocol):
  """The other processes of a run."""

  def announce(self, told: str) -> None:
    """Passes on to all others that this process was told to end, and by what."""

  def last_point(self, point: int | None) -> int | None:
    """The point at which all processes end; None if one of them is in no saving section.

    Args:
      point: number of points that this process has passed; None if it is in no saving section.
    """


class _Signals:
  """What this process was told, and what it does then."""

  def __init__(self, held: bool, group: Group | None):
    self.held, self.group = held, group
    self.told = ""  # by what it was told to end, "" before
    self.stopped_code = 0
    self._code: int | None = None
    self._own = 0.0  # when the first signal came
    self._since = 0.0  # when it was told, or left a saving section later
    self._sections, self._points, self._last = 0, 0, -1
    self._raised = False
    self._agreeing = threading.Lock()  # held while the processes agree on the last point
    self.closed = threading.Event()

  @property
  def code(self) -> int:
    return self.stopped_code if self._code is None else self._code

  def handle(self, number: int, _: Any) -> None:
    """Python's handler, in the main thread, which may leave there."""
    self.hear(number)
    self.leave()

  def listen(self, descriptor: int) -> None:
    """The thread that hears of signals whatever the main thread does."""
    while heard := os.read(descriptor, 1):
      number = heard[0]
      if self._own and time.monotonic() - self._own > REPEATED.get(number, REPEATED[signal.SIGTERM]):
        end(f"stopped at once, told twice (by {_NAMES.get(number, number)}); the same command goes on", self.code)
      self.hear(number)
    os.close(descriptor)

  def hear(self, number: int) -> None:
    """Notes a signal."""
    if number in _NAMES:
      self._own = self._own or time.monotonic()
      self.tell(_NAMES[number], INTERRUPTED if number == signal.SIGINT else None)

  def tell(self, told: str, code: int | None) -> None:
    """Notes once, from any thread, why to end."""
    if self.told:
      return
    self._code, self._since, self.told = code, time.monotonic(), told
    threading.Thread(target=self._see_to_it, daemon=True).start()
    if self.group:
      threading.Thread(target=self._agree, args=(self.group,), daemon=True).start()

  def _see_to_it(self) -> None:
    """Ends the process where the main thread does not."""
    while not self.closed.wait(0.05):
      if not self._sections and time.monotonic() - self._since > GRACE:
        end(f"stopped by {self.told}; the same command goes on", self.code)

  def _agree(self, group: Group) -> None:
    """Agrees with the other processes on the point at which all end."""
    with self._agreeing:
      group.announce(self.told)
      last = group.last_point(self._points if self._sections else None)
      if last is None:  # saving takes all of them
        self._sections, self._since, last = 0, time.monotonic(), 0
      self._last = last

  def leave(self) -> None:
    """Raises `Preempted`, once, if the process was told to end and is in no section."""
    if self.told and not (self._sections or self.held or self._raised):
      self._raised = True
      raise Preempted(f"stopped by {self.told}; the same command goes on")

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    self.leave()
    self._sections += 1
    try:
      yield
    finally:
      self._sections, self._since = max(self._sections - 1, 0), time.monotonic()
    self.leave()

  def reached(self) -> bool:
    if not self._sections:
      self.leave()
      return False
    if not self.group:
      return bool(self.told)
    with self._agreeing:
      self._points += 1
    if not self._sections:
      self.leave()
    return 0 <= self._last <= self._points


_current: _Signals | None = None
_group: Group | None = None


def end(line: str, code: int) -> NoReturn:
  """Ends the process as it stands, from any thread, with a line on stderr."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode())
  os._exit(code)


@contextlib.contextmanager
def handled(
  numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT), held: bool = False
) -> Iterator[None]:
  """Handles signals within the block as the module says; does nothing where they are handled, or in another thread.

  Args:
    numbers: the signals; one that is ignored stays so, as under nohup.
    held: the main thread does not leave until `release`, as during imports.
  """
  global _current
  if _current or threading.current_thread() is not threading.main_thread():
    yield
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  own = _Signals(held, _group)
  threading.Thread(target=own.listen, args=(read,), daemon=True).start()
  other = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _current = own
  heard = [number for number in (*numbers, _WAKE) if signal.getsignal(number) is not signal.SIG_IGN]
  earlier = {number: signal.signal(number, own.handle) for number in heard}
  try:
    yield
  finally:
    for number, handler in earlier.items():
      signal.signal(number, handler)
    _current = None
    signal.set_wakeup_fd(other)
    own.closed.set()
    os.close(write)


def join(group: Group | None) -> None:
  """From now on this process ends together with those of a group."""
  global _group
  _group = group
  if _current:
    _current.group = group


def release(stopped_code: int) -> None:
  """Ends `held`.

  Args:
    stopped_code: exit code after SIGTERM.

  Raises:
    Preempted: if the process was told to end meanwhile.
  """
  if _current:
    _current.stopped_code, _current.held = stopped_code, False
    _current.leave()


def tell(told: str, code: int | None = None) -> None:
  """Ends this process as a signal does, from any thread.

  Args:
    told: by what, for the line at the end.
    code: exit code; that after SIGTERM unless given.
  """
  if _current and not _current.told:
    _current.tell(told, code)
    signal.pthread_kill(threading.main_thread().ident, _WAKE)


def told() -> str:
  """By what this process was told to end; "" if it was not."""
  return _current.told if _current else ""


def exit_code() -> int:
  """Exit code of a process that was told to end."""
  return _current.code if _current else 0


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """A section whose state is to be saved, which ends where `reached` says so.

  Outside of `handled` it handles SIGTERM itself.

  Raises:
    Preempted: at its end, if the process was told to end in it.
  """
  with handled((signal.SIGTERM,)):
    if _current:
      with _current.saving():
        yield
    else:
      yield


def reached() -> bool:
  """Whether a saving section is to end here; all processes must ask at the same points.

  Raises:
    Preempted: if another process is in no such section, so that nothing can be saved.
  """
  return bool(_current) and _current.reached()


def check() -> None:
  """A point such as a batch of an evaluation, at which a saving section may be left.

  Raises:
    Preempted: if it is to end here.
  """
  if reached():
    raise Preempted(f"stopped by {told()}; the same command goes on")


def command(run: Callable[..., Any], *arguments: Any, **named: Any) -> None:
  """Runs a command, which SIGTERM and Ctrl-C end with one line, and with exit code 143 or 130, as a shell's."""
  with handled():
    release(STOPPED)
    try:
      run(*arguments, **named)
    except Preempted as stopped:
      sys.stderr.write(f"{stopped}\n")
      sys.exit(exit_code())
