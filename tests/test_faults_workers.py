"""Processes of a pool that are killed: one error that says so, never a wait without end nor a shorter result."""

import contextlib
import multiprocessing
import os
import pathlib
import re
import signal
import struct
import sys
import threading

import pytest

from codebind_jax.data import ahead as ahead_lib
from codebind_jax.data.ahead import WorkerKilled, ahead
from codebind_jax.data.worlds import render
from tests.world_fixtures import svg

SAID = "one of [12] worker processes was killed by SIGKILL, .*memory is short; .*fewer workers .config.data.workers"


class Numbers:
  """Items that are their numbers and the process that read them."""

  def __getitem__(self, number):
    return number, os.getpid()


class Deadly(Numbers):
  """An item whose reading kills its process."""

  def __getitem__(self, number):
    if number == 5:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(number)


class HalfAnswered(Numbers):
  """A process that is killed in the middle of its answer, whose rest the pool waits for."""

  def __getitem__(self, number):
    if number == 5:
      frame = sys._getframe()
      while "result_queue" not in frame.f_locals:
        frame = frame.f_back
      os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1000) + b"half")
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(number)


class Unreadable:
  """What its processes cannot unpickle."""

  def __reduce__(self):
    return int, ("no number",)


def children():
  return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(ahead_lib, "_LOOK", 0.2)
  before = children()
  yield
  assert children() == before


@pytest.mark.parametrize("items", [Deadly(), HalfAnswered()], ids=["reading", "answering"])
def test_a_worker_that_is_killed_ends_the_loop_with_an_error(items):
  with pytest.raises(WorkerKilled, match=SAID), contextlib.closing(ahead(items, workers=2)) as following:
    assert [next(following)[0] for _ in range(5)] == list(range(5))
    for number in range(5, 20):
      assert next(following)[0] == number


def test_workers_that_are_killed_idle_do_not_hold_up_the_end_nor_the_next_item():
  """One of two that wait for work holds the lock under which both wait."""
  for stop in (4, None):
    following = ahead(Numbers(), workers=2, stop=stop)
    pids = {next(following)[1] for _ in range(4)} if stop else {next(following)[1]}
    for process in multiprocessing.active_children():
      if process.pid in pids:
        process.kill()
        process.join()
    if not stop:
      with pytest.raises(WorkerKilled, match=SAID):
        for _ in range(20):
          next(following)
    following.close()


def test_items_that_workers_cannot_unpickle_are_the_error_itself():
  with pytest.raises(ValueError, match="invalid literal.*'no number'"), contextlib.closing(
    ahead(Unreadable(), workers=1)
  ) as following:
    next(following)


class Killing(dict):
  """Kills the process that unpickles it."""

  def __reduce__(self):
    return signal.raise_signal, (signal.SIGKILL,)


def test_training_processes_that_are_killed_are_told(tmp_path, monkeypatch):
  from codebind_jax.tools import runs  # here, as workers import this file without JAX

  monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
  with pytest.raises(ValueError, match="2 of 2 processes did not end .*killed by SIGKILL, .*memory.* lower --parallel"):
    runs._in_processes(Killing(), tmp_path, 2)


def pictures(count):
  return [(svg(f"#0000{n:02x}"), True) for n in range(count)]


def killed(worker, number):
  os.kill(worker.process.pid, number)
  worker.process.wait()


def when_asked_for(monkeypatch, content, act):
  """Calls `act` with a renderer's process before it is asked for that picture."""
  real = render._Worker.ask

  def ask(worker, data, vector, size):
    if data == content:
      act(worker)
    return real(worker, data, vector, size)

  monkeypatch.setattr(render._Worker, "ask", ask)


def test_a_renderer_that_is_killed_is_no_fault_of_its_picture(monkeypatch):
  when_asked_for(monkeypatch, b"unlucky", lambda worker: killed(worker, signal.SIGKILL))
  with pytest.raises(render.RendererKilled, match="was killed by SIGKILL, perhaps for want of memory; nothing"):
    with render.Renderer(8, workers=2) as renderer:
      list(renderer.draw([*pictures(3), (b"unlucky", True), *pictures(40)]))


def test_a_picture_at_which_renderers_crash_is_left_out(monkeypatch):
  when_asked_for(monkeypatch, b"bomb", lambda worker: killed(worker, signal.SIGSEGV))
  with render.Renderer(8, workers=1) as renderer:
    good, dead, again = renderer.draw([*pictures(1), (b"bomb", True), *pictures(1)])
  assert good == again and re.search("crashes at it .was killed by SIGSEGV", str(dead))


def test_a_crash_that_does_not_come_again_changes_nothing(monkeypatch):
  first = threading.Event()

  def once(worker):
    if not first.is_set():
      first.set()
      killed(worker, signal.SIGSEGV)

  content = pictures(5)[4][0]
  with render.Renderer(8, workers=2) as renderer:
    undisturbed = list(renderer.draw(pictures(8)))
    when_asked_for(monkeypatch, content, once)
    assert list(renderer.draw(pictures(8))) == undisturbed and first.is_set()


def test_nothing_is_left_of_pools():
  before = sorted(pathlib.Path("/proc/self/fd").iterdir())
  for _ in range(3):
    with contextlib.closing(ahead(Numbers(), workers=2)) as following, render.Renderer(8, workers=2) as renderer:
      next(following)
      list(renderer.draw(pictures(4)))
  assert len(list(pathlib.Path("/proc/self/fd").iterdir())) <= len(before) + 2  # the tracker of semaphores, once
