"""One writer of a folder: refused by name, taken over from the dead, near and far, across hosts."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from codebind_jax import files
from codebind_jax.files import far, locks
from tests.far_servers import SETTINGS, VARIABLES, Server
from tests.processes import REPOSITORY

NUMBERS = itertools.count()
HOLDER = """
import pathlib, sys
from codebind_jax import files
with files.held(files.path(sys.argv[1]), "trains"):
  print("held", flush=True)
  sys.stdin.read()
"""


@pytest.fixture(scope="module")
def servers():
  made = {}

  def get(scheme):
    if scheme not in made:
      made[scheme] = Server(scheme)
    return made[scheme]

  yield get
  for server in made.values():
    server.close()


@pytest.fixture(params=["near", "s3", "gs"])
def folder(request, tmp_path, servers, monkeypatch):
  if request.param == "near":
    yield tmp_path
    return
  for package in ("moto", "s3fs", "gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(package)
  files.close()
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in (SETTINGS | servers(request.param).environment()).items():
    monkeypatch.setenv(name, value)
  yield files.path(f"{request.param}://bucket/{next(NUMBERS)}")
  files.close()


@pytest.fixture
def waits(monkeypatch):
  """Calls of sleep; nothing sleeps, and what is in `then` happens meanwhile, one a call."""
  waited, then = [], []

  def sleep(seconds):
    waited.append(seconds)
    if then:
      then.pop(0)()

  monkeypatch.setattr(locks, "beat", locks.Beat(sleep=sleep))
  return waited, then


def holder(folder):
  process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=REPOSITORY, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
  assert process.stdout.readline() == "held\n"
  return process


def record_of(folder):
  return json.loads(files.read_text(folder / locks.WRITER))


def write(folder, **changes):
  """The lock that a process of another machine has left."""
  record = {"work": "trains", "host": "node7", "machine": "other", "pid": 41, "started": "5", "since": "then",
            "mark": "x", "beat": 0}  # fmt: skip
  files.write_whole(folder / locks.WRITER, json.dumps(record | changes))


def test_a_folder_has_one_writer_and_nothing_is_left(folder):
  with files.held(folder, "trains"):
    mine = record_of(folder)
    assert mine["pid"] == os.getpid()
    message = rf"process {os.getpid()} on .* trains here since 20.* UTC; allowed: one at a time, so wait"
    with pytest.raises(ValueError, match=message), files.held(folder, "trains"):
      pass
    assert record_of(folder)["mark"] == mine["mark"]
    files.make_folder(folder / "another")
    with files.held(folder / "another", "trains"):
      pass
  assert files.contents(folder) == {}
  with files.held(folder, "trains"):
    pass


def test_that_of_a_process_that_lives_is_refused_and_that_of_a_killed_one_free_at_once(folder, waits, caplog):
  process = holder(folder)
  with pytest.raises(ValueError, match=f"process {process.pid} on "), files.held(folder, "trains"):
    pass
  process.send_signal(signal.SIGKILL)
  process.wait()
  with files.held(folder, "trains"):
    assert record_of(folder)["pid"] == os.getpid()
  assert f"taken over from a process that ended without saying so: process {process.pid} on" in caplog.text
  assert waits[0] == [] and files.contents(folder) == {}
  for pipe in (process.stdin, process.stdout):
    with contextlib.suppress(BrokenPipeError):
      pipe.close()


def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(folder, waits):
  write(folder, machine=locks._machine(), pid=os.getppid(), started="1")
  with files.held(folder, "trains"):
    pass
  assert waits[0] == []


def test_that_of_another_host_is_taken_over_when_it_is_silent(folder, waits, caplog):
  write(folder)
  with files.held(folder, "trains"):
    assert record_of(folder)["pid"] == os.getpid()
  assert "process 41 on node7 trains here since then; it is taken over if it shows no sign of life" in caplog.text
  assert str(folder / locks.WRITER) in caplog.text
  assert sum(waits[0]) == 61, "the limit, and a second in which another host may do the same"


def test_that_of_another_host_that_shows_life_is_refused(folder, waits):
  write(folder)
  waits[1].extend([lambda: None, lambda: write(folder, beat=1)])
  with pytest.raises(ValueError, match=f"process 41 on node7 .* if that process is gone, remove {folder}/.writer.lock"):
    with files.held(folder, "trains"):
      pass
  assert len(waits[0]) == 2 and record_of(folder)["host"] == "node7"


def test_one_that_is_removed_while_it_is_waited_for_is_free(folder, waits):
  write(folder)
  waits[1].append(lambda: files.remove(folder / locks.WRITER))
  with files.held(folder, "trains"):
    pass
  assert len(waits[0]) == 1


def test_of_two_hosts_that_take_over_at_once_one_has_it(folder, waits):
  write(folder)
  waits[1].extend([lambda: None] * 60 + [lambda: write(folder, host="node8", mark="y")])
  with pytest.raises(ValueError, match="process 41 on node8"), files.held(folder, "trains"):
    pass
  assert record_of(folder)["host"] == "node8", "what another has is not removed"


def test_what_is_no_record_is_waited_for_like_another_host(folder, waits):
  files.write_whole(folder / locks.WRITER, '{"pid": ')
  with files.held(folder, "trains"):
    pass
  assert sum(waits[0]) == 61


def test_a_writer_shows_life_and_notices_that_it_has_lost_the_folder(folder, monkeypatch):
  slot = (locks._FarSlot if files.is_far(folder) else locks._NearSlot)(folder / locks.WRITER)
  monkeypatch.setattr(locks, "beat", locks.Beat(every=0.01))
  with files.held(folder, "trains"):
    files.check_held(folder / "checkpoints")
    before = slot.read()[1]
    while slot.read()[1] == before:
      pass
    write(folder)
    while not locks._mine[str(folder)].lost:
      pass
    with pytest.raises(RuntimeError, match="another one has taken over: process 41 on node7 trains here since then"):
      files.check_held(folder / "checkpoints")
  assert record_of(folder)["host"] == "node7"
  files.check_held(folder)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_far_object_is_written_on_condition(scheme, servers, monkeypatch):
  for package in ("moto", "s3fs", "gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(package)
  files.close()
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in (SETTINGS | servers(scheme).environment()).items():
    monkeypatch.setenv(name, value)
  place = files.path(f"{scheme}://bucket/condition")
  asked = []
  if scheme == "gs":  # whose server here knows no conditions
    from gcsfs.core import GCSFileSystem

    call = GCSFileSystem._call

    async def spied(self, method, path, *args, **kwargs):
      asked.append(kwargs.get("ifGenerationMatch"))
      return await call(self, method, path, *args, **kwargs)

    monkeypatch.setattr(GCSFileSystem, "_call", spied)
  assert far.put_if(place, b"1", None)
  tag = far.found(place).tag
  assert far.put_if(place, b"2", tag) and files.read_bytes(place) == b"2"
  if scheme == "gs":
    assert [one for one in asked if one] == ["0", tag]
  else:
    assert not far.put_if(place, b"3", None) and not far.put_if(place, b"3", tag)
    assert files.read_bytes(place) == b"2"
  files.close()
