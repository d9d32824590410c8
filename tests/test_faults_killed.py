"""kill -9 at random points of embedding, saving and writing shards: the same command then gives the same bytes."""

import hashlib
import re
import signal
import sys

import numpy as np
import pytest

from tests.processes import started

POINTS = 20
KINDS = ("embed", "save", "shards", "index")


def run(kind, folder, at, arguments):
  process = started([sys.executable, "-m", "tests.killed_work", kind, str(folder), str(at), *map(str, arguments)])
  out, err = process.communicate(timeout=600)
  assert process.returncode in (0, -signal.SIGKILL), err[-3000:]
  return process.returncode, out


def content(folder):
  """Path -> hash of all that a command has written; hidden files are locks."""
  paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
  return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_the_same_command_gives_the_same_bytes(kind, trained, tmp_path, request):
  manifest, _, workdir = trained
  arguments = {"embed": (workdir, manifest), "save": (workdir,), "shards": (manifest,), "index": ()}[kind]
  (tmp_path / "whole").mkdir()
  code, out = run(kind, tmp_path / "whole", -1, arguments)
  whole, events = content(tmp_path / "whole"), int(re.search(r"^(\d+) events$", out, re.MULTILINE)[1])
  assert code == 0 and whole
  rng = np.random.default_rng((request.config.getoption("--kill-seed"), KINDS.index(kind)))
  folder, killed = tmp_path / "killed", 0
  folder.mkdir()
  for at in rng.integers(0, events, POINTS // 2 if kind in ("embed", "save") else POINTS):
    code, _ = run(kind, folder, at, arguments)
    killed += code != 0
  assert killed, "no process was killed"
  assert run(kind, folder, -1, arguments)[0] == 0
  assert content(folder) == whole
