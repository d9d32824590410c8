"""Evaluation by two processes: the numbers of one, and every process reads its own part of the rows."""

import json
import socket
import sys

import numpy as np
import pytest

from tests.processes import finish, started
from tests.train_fixtures import COLOURS


@pytest.fixture(scope="module")
def told(trained, tmp_path_factory):
  """(of one process with two devices, of two processes with one each), each a list by process."""
  out = tmp_path_factory.mktemp("told")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  for processes in (1, 2):
    running, folder = [], out / str(processes)
    folder.mkdir()
    for process in range(processes):
      names = [port, process, processes, trained[0], folder / "root", trained[2], folder]
      command = [sys.executable, "-m", "tests.evaluate_worker", *map(str, names)]
      running.append(started(command, devices=2 // processes))
    finish(*running)
  read = lambda processes, process: json.loads((out / str(processes) / f"{process}.json").read_text())
  return [[read(processes, process) for process in range(processes)] for processes in (1, 2)], out


def test_metrics_are_those_of_one_process_to_the_last_bit(told):
  ((one,), (first, second)), _ = told
  for kind in ("cached", "metrics"):
    assert first[kind] == one[kind] and first[kind]
    assert second[kind] == {}  # process 0 evaluates
  assert "eval/squares_test/zeroshot/image/top1" in one["cached"]
  assert "eval/squares_test/probe/label/image/specific" in one["metrics"]


def test_every_process_has_the_embeddings_of_all_rows(told):
  _, out = told
  one, first, second = (np.load(out / name) for name in ("1/0.npz", "2/0.npz", "2/1.npz"))
  for modality in ("image", "text"):
    for other in (first, second):
      np.testing.assert_array_equal(other[modality], one[modality])


def test_every_process_reads_its_own_part(told):
  ((one,), both), _ = told
  # The command asks for val and test alone. The 24 training rows are padded to 32, of which a process has 16.
  for kind, shares in (("reads", [8, 8]), ("hashes", [8, 8]), ("streamed", [16 + 8, 8 + 8])):
    assert set(one[kind].values()) == {1}
    parts = [own[kind] for own in both]
    assert not set(parts[0]) & set(parts[1]) and parts[0] | parts[1] == one[kind]
    assert [len(part) for part in parts] == shares


def test_a_picture_that_one_process_cannot_read_is_bad_for_all(told):
  ((one,), (first, second)), _ = told
  assert one["bad"]["1"] == first["bad"]["1"] == second["bad"]["1"]
  assert one["bad"]["1"] == [f"{colour}4" for colour in COLOURS if colour != "blue"]
  assert "squares.jsonl:15: image: a hole (1 bad records, 0 allowed" in one["bad"]["0"]
  assert first["bad"]["0"] == one["bad"]["0"]  # which has read the first half of the rows
  assert "squares.jsonl:15: image: another process could not read it (1 bad records" in second["bad"]["0"]
