"""kill -9 at random points of commands that write: the same command then gives the same bytes, or the same results."""

import hashlib
import re
import signal
import sys

import numpy as np
import pytest

from tests.damage import equal
from tests.processes import started
from tests.train_fixtures import arrays_of, lines_of
from tests.world_fixtures import read_world

POINTS = 20
KINDS = ("embed", "save", "shards", "index", "prepare", "world", "compare")
HALF = ("embed", "save", "compare")  # kinds that take long: half as many points


def run(kind, folder, at, arguments):
  process = started([sys.executable, "-m", "tests.killed_work", kind, str(folder), str(at), *map(str, arguments)])
  out, err = process.communicate(timeout=600)
  assert process.returncode in (0, -signal.SIGKILL), err[-3000:]
  return process.returncode, out


def content(folder):
  """Path -> hash of all that a command has written; hidden files are locks."""
  paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
  return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def results(folder):
  """Metrics and arrays of the runs of a comparison, without what is wall-clock."""
  runs = sorted(path.parent for path in (folder / "run").rglob("config.json") if path.parent != folder / "run")
  return {run.relative_to(folder).as_posix(): (lines_of(run), arrays_of(run)) for run in runs}


def worlds(folder):
  """Names of the files, and all that is read of the world: array_record's bytes differ from build to build."""
  paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
  return sorted(paths), [read_world(manifest.parent) for manifest in folder.rglob("manifest.json")]


READ = {"compare": results, "prepare": worlds, "world": worlds}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_the_same_command_gives_the_same_bytes(kind, trained, tmp_path, request):
  manifest, _, workdir = trained
  arguments = {"embed": (workdir, manifest), "save": (workdir,), "shards": (manifest,), "index": ()}.get(kind, ())
  (tmp_path / "whole").mkdir()
  code, out = run(kind, tmp_path / "whole", -1, arguments)
  read = READ.get(kind, content)
  whole, events = read(tmp_path / "whole"), int(re.search(r"^(\d+) events$", out, re.MULTILINE)[1])
  assert code == 0 and whole
  rng = np.random.default_rng((request.config.getoption("--kill-seed"), KINDS.index(kind)))
  folder, killed = tmp_path / "killed", 0
  folder.mkdir()
  for at in rng.integers(0, events, POINTS // 2 if kind in HALF else POINTS):
    code, _ = run(kind, folder, at, arguments)
    killed += code != 0
  assert killed, "no process was killed"
  assert run(kind, folder, -1, arguments)[0] == 0
  assert equal(read(folder), whole)
