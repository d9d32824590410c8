"""Batches as a function of the step: bits, slices of processes, workers, fingerprints."""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from codebind_jax.data.ahead import ahead
from codebind_jax.data.batches import Batches, SourceBatches
from codebind_jax.schema import difference
from tests.batches_fixtures import EXTRA, Failing, Probe, digest, leaves, toy, toy_batches
from tests.processes import REPOSITORY
from tests.source_fixtures import Rows

# Of the first twelve batches, more than two epochs, as they were when Grain's iterators drew them.
KNOWN = {
  (4, True, False): "6e1fb2bb423f0cb1", (6, True, False): "f47b1cb3bd110069", (6, True, True): "a8efc6028eadc6f9",
  (4, False, False): "5984dc0c49136b67", (6, False, False): "5186ab816ff363ce", (6, False, True): "7da94f997893d10e",
}  # fmt: skip


@pytest.mark.parametrize("rows, unique, extra", KNOWN)
def test_order_and_draws_stay_as_they_were(rows, unique, extra):
  batches = toy_batches(rows, unique_labels=unique, **EXTRA if extra else {})
  assert digest(map(batches.__getitem__, range(12))) == KNOWN[rows, unique, extra]


@pytest.mark.parametrize("rows, extra", [(4, {}), (8, {}), (4, EXTRA), (12, {"extra": 10, "extra_share": 0.4})])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_their_rows_of_the_same_batch(rows, extra, processes):
  whole = toy_batches(rows, **extra)
  for step in (0, 1, 5, 40):
    parts = [toy_batches(rows, process=p, processes=processes, **extra)[step] for p in range(processes)]
    assert all(len(part["_row"]) == rows // processes for part in parts)
    for found in zip(leaves(whole[step]), *map(leaves, parts), strict=True):
      (path, expected), *own = found
      np.testing.assert_array_equal(expected, np.concatenate([x for _, x in own]), err_msg=path)


def test_a_process_reads_no_rows_but_its_own():
  read, (source, feeds) = [], toy()
  feed, places = feeds["text"], feeds["text"].places

  class Counted(type(feed.reader)):
    def __call__(self, place, pooled=False):
      read.append(place)
      return super().__call__(place, pooled)

  feed = dataclasses.replace(feed, reader=Counted(feed.reader.values))
  one = SourceBatches(source, {"text": feed}, rows=12, seed=0, process=1, processes=4, extra=10, extra_share=0.4)
  rows = one[0]["_row"]
  assert len(rows) == len(read) == 3
  own = [set(places[feed.starts[row] : feed.starts[row + 1], 0].tolist()) for row in rows]
  assert all(place in choices for place, choices in zip(read, own))


def test_batches_do_not_depend_on_threads_workers_or_where_reading_starts():
  batches = Batches({"a": toy_batches(6, **EXTRA), "b": toy_batches(4, unique_labels=False)})
  expected = [digest([batches[step]]) for step in range(20)]
  assert len(set(expected)) == 20
  for first, options in [(0, {}), (3, {"threads": 1}), (11, {"threads": 5}), (5, {"workers": 2}), (8, {"workers": 1})]:
    with contextlib.closing(batches.start(first, **options)) as following:
      assert [digest([one.batch]) for one in itertools.islice(following, 9)] == expected[first : first + 9]


def test_workers_hold_no_jax_and_one_blas_thread_and_outlast_a_signal_to_all():
  probe = Probe(Batches({"toy": toy_batches(4)}))
  with contextlib.closing(ahead(probe, 10, workers=2)) as following:
    found = list(itertools.islice(following, 8))
  assert [one["step"] for one in found] == list(range(10, 18))
  assert digest(one["batch"] for one in found) == digest(probe.batches[step] for step in range(10, 18))
  pids = {one["pid"] for one in found}
  assert len(pids) <= 2 and os.getpid() not in pids
  for one in found:
    assert one["modules"] == [] and one["platform"] == "cpu" and one["pools"] and set(one["pools"]) == {1}
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_reading_raises_comes_when_its_turn_comes(workers):
  with contextlib.closing(ahead(Failing(), 0, workers=workers)) as following:
    assert [next(following), next(following)] == [0, 1]
    with pytest.raises(OSError, match="item 2 is gone"):
      next(following)


def test_a_worker_that_ends_is_an_error():
  with contextlib.closing(ahead(Failing(die=True), 2, workers=1)) as following:
    with pytest.raises(RuntimeError, match="one of 1 worker processes ended with code 3; without workers"):
      next(following)


KILLED = """
import os, signal
from codebind_jax.data.ahead import ahead
from codebind_jax.data.batches import Batches
from tests.batches_fixtures import Probe, toy_batches
if __name__ == "__main__":
  following = ahead(Probe(Batches({"toy": toy_batches(4)})), 0, workers=1)
  print(next(following)["pid"], flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_process_end(tmp_path):
  script = tmp_path / "killed.py"
  script.write_text(KILLED)
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
  # The worker has the pipes too: had it not ended, `run` would still wait for their end.
  assert done.returncode == -signal.SIGKILL and int(done.stdout) > 0, done.stderr


def test_kept_batches_are_read_once_and_not_sent():
  kept = Batches({"toy": toy_batches(4)}, keep=True)
  assert kept[3] is kept[3] and digest([kept[3]]) == digest([Batches({"toy": toy_batches(4)})[3]])
  fresh = pickle.loads(pickle.dumps(kept))
  assert fresh[3] is not fresh[3] and digest([fresh[3]]) == digest([kept[3]])


def test_fingerprint_names_what_changed():
  source, feeds = toy()
  make = lambda source=source, feeds=feeds, **options: Batches({
    "toy": SourceBatches(source, feeds, **{"rows": 4, "seed": 3} | options)
  }).fingerprint  # fmt: skip
  assert make() == make(process=1, processes=2) == json.loads(json.dumps(make()))
  labels = [row["label"] for row in source.rows]
  relabelled = lambda labels: Rows("toy", [{"label": label} for label in labels])
  image, text = feeds["image"], feeds["text"]
  rarer = dataclasses.replace(image, augmented=0.25)
  other = dataclasses.replace(text, made_from="other keys")
  for changed, what in [
    (make(relabelled([*labels[:-1], "new"])), {"files.toy", "groups"}),
    (make(relabelled(labels[::-1])), {"files.toy", "groups"}), (make(source.select(range(29))), {"files.toy", "rows",
                                                                                              "groups"}),
    (make(feeds={"image": image}), {"items of text"}), (make(feeds={"image": rarer, "text": text}), {"items of image"}),
    (make(seed=4), {"seed"}), (make(feeds={"image": image, "text": other}), {"items of text"}),
    (make(rows=6), {"rows of a batch"}), (make(unique_labels=False), {"unique_labels"}),
    (make(**EXTRA), {"further rows", "further rows of a batch"}),
  ]:  # fmt: skip
    assert {line.partition(":")[0] for line in difference(make(), changed)} == {f"toy.{name}" for name in what}


@pytest.mark.parametrize("options, message", [
    ({"rows": 0}, "batch_size of 'source': 0 must be a positive multiple of the 1 processes"),
    ({"rows": 6, "process": 0, "processes": 4}, "batch_size of 'source': 6 must be a positive multiple of the 4"),
    ({"rows": 40}, r"40 rows .* 'source', which has 17 distinct labels or contents; allowed: up to 17"),
    ({"rows": 40, "unique_labels": False}, "config.batch_size: 40 rows .* 'source', which has 30; allowed: up to 30"),
    ({"rows": 4, "extra": 10, "extra_share": 0.1}, "config.data.extra: got 0.1, which is 0 of the 4 rows of 'source'; "
     "allowed: 0, or a share of 1 to 3 rows"),
    ({"rows": 4, "extra": 10, "extra_share": 0.9}, "config.data.extra: got 0.9, which is 4 of the 4 rows"),
])  # fmt: skip
def test_batches_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    toy_batches(**options)
