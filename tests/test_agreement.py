"""What processes of one run compare before they work, and how they find each other."""

import json
import socket
import sys
import threading

import numpy as np
import pytest

from codebind_jax.data import open_source
from codebind_jax.runtime import agreement, distributed, rendezvous
from tests.processes import started
from tests.train_fixtures import write_manifest


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """What two processes said of their differences, each a dict."""
  folder = tmp_path_factory.mktemp("compared")
  paths = [write_manifest(folder / name, 3) for name in ("one", "other", "shorter", "renamed")]
  rows = [json.loads(line) for line in paths[1].read_text().splitlines()]
  paths[1].write_text("".join(json.dumps(row | {"text": [row["text"][0][::-1]]}) + "\n" for row in rows))
  paths[2].write_text("".join(line for line in paths[2].read_text().splitlines(True) if '"red2"' not in line))
  paths[3].write_text(paths[3].read_text().replace('"blue1"', '"bleu1"'))
  port = free_port()
  command = lambda n: [sys.executable, "-m", "tests.agreement_worker", str(port), str(n), *map(str, paths)]
  running = [started(command(number)) for number in range(2)]
  told = []
  for process in running:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    told.append(json.loads(out.splitlines()[-1]))
  return told


def test_processes_that_are_alike_find_no_difference(compared):
  assert compared[0]["same"] == ""


@pytest.mark.parametrize(
  ("what", "names"),
  [
    ("config", "config.optim.learning_rate: process 0 has 0.001, process 1 has 0.002"),
    ("version", "version of jax: process 0 has 0.9.0, process 1 has 0.9.1"),
    ("names", "source 'circles': process 0 has there, process 1 has none"),
    ("ids", "source 'squares': 40 records on process 0, 40 on process 1; first other record, number 11: 'blue1'"),
    ("workdir", "workdir: process 0 has run0, process 1 has run1"),
    ("code", "codebind_jax/step.py differs"),
    ("content", "source 'squares': text of record 'red0' differs"),
    ("records", "source 'squares': 40 records on process 0, 39 on process 1; first other record, number 2: 'red2'"),
  ],
)
def test_a_difference_is_named_alike_on_every_process(compared, what, names):
  assert names in compared[0][what]
  assert compared[0] == compared[1]


def test_a_record_s_number_changes_with_what_the_index_knows(tmp_path):
  path = write_manifest(tmp_path, 3)
  first = agreement.row_hashes(open_source(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(np.unique(first)) == len(rows)
  changes = ({"id": "new"}, {"label": "pink"}, {"split": "test"}, {"text": None})
  for place, change in enumerate(changes):
    rows[place] |= change
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  second = agreement.row_hashes(open_source(path))
  assert np.flatnonzero(first != second).tolist() == list(range(len(changes)))


def test_only_so_many_differences_are_named():
  first, second = ({f"config.k{n}": str(n + shift) for n in range(9)} for shift in (0, 1))
  line = agreement.difference(first, second, 3)
  assert "config.k0: process 0 has 0, process 3 has 1" in line and line.endswith("; 4 more")


def met(*calls):
  """What `meet` said to each of several processes: (number, count it was told)."""
  port, told = free_port(), {}

  def one(place, number, own):
    try:
      rendezvous.meet(f"127.0.0.1:{port}", own, number, 3.0)
      told[place] = ""
    except ValueError as error:
      told[place] = str(error)

  threads = [threading.Thread(target=one, args=(place, *call)) for place, call in enumerate(calls)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [told[place].replace(str(port), "PORT") for place in range(len(calls))]


def test_processes_meet():
  assert met((0, 3), (1, 3), (2, 3)) == ["", "", ""]


@pytest.mark.parametrize(
  ("calls", "line"),
  [
    (((0, 3), (1, 3)), "2 of --num_processes=3 processes have come to 127.0.0.1:PORT in 3 s; --process_id missing: 2"),
    (((0, 2), (1, 3)), "--num_processes: process 0 has 2, process 1 has 3"),
    (((0, 3), (1, 3), (1, 3)), "--process_id: 1 is given to two processes, on "),
  ],
  ids=["missing", "count", "twice"],
)
def test_what_does_not_fit_together_is_said_to_all_that_are_there(calls, line):
  told = met(*calls)
  assert all(one.startswith(line) for one in told), told


def test_what_is_wrong_alone_is_said_at_once():
  for address in ("nonsense", "127.0.0.1:port", "127.0.0.1:99999999", ":80"):
    with pytest.raises(ValueError, match=f"--coordinator: got '{address}'; allowed: HOST:PORT"):
      rendezvous.meet(address, 2, 1, 1.0)
  with pytest.raises(ValueError, match="no.such.host.invalid:1234', whose host has no address"):
    rendezvous.meet("no.such.host.invalid:1234", 2, 1, 1.0)
  for number, count in ((2, 2), (-1, 2), (0, 0)):
    with pytest.raises(ValueError, match=f"--process_id: got {number} of --num_processes={count}"):
      rendezvous.meet("127.0.0.1:1", count, number, 1.0)
  with pytest.raises(ValueError, match="process 0 did not answer at 127.0.0.1:1 in 0.5 s; nothing listens there"):
    rendezvous.meet("127.0.0.1:1", 2, 1, 0.5)


def test_a_port_is_taken_or_another_program_s():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ValueError, match="of this host is taken, by another program or by another process"):
      rendezvous.meet(address, 2, 0, 1.0)
    answer = threading.Thread(target=lambda: server.accept()[0].close())
    answer.start()
    with pytest.raises(ValueError, match="is no process 0 that waits for others"):
      rendezvous.meet(address, 2, 1, 0.5)
    answer.join()


def test_a_number_of_the_environment_must_be_one(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: got 'two'; allowed: an integer"):
    distributed.start("127.0.0.1:1", None, 0)
