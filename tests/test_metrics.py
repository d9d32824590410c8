"""The metrics file survives kills, resumes and odd values; intervals and rates against hand computations."""

import dataclasses
import doctest
import json
import logging
import math
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from tensorboardX.proto import event_pb2

from codebind_jax import config as config_lib
from codebind_jax import schema
from codebind_jax.data import examples
from codebind_jax.evaluators import intervals
from codebind_jax.runtime import metrics
from codebind_jax.train import log_progress
from configs import stage1


def events(folder):
  """Steps, names and values of all TensorBoard scalars, file after file, as written."""
  found = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):  # A record: length, its checksum (4 bytes), the event, its checksum (4 bytes).
      length = int.from_bytes(data[at : at + 8], "little")
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += length + 16
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      if event.HasField("session_log"):
        found.append((event.step, "start", None))
  return found


def test_lines_keep_all_digits_and_order(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, "stage1", {"train/b": 0.1 + 0.2, "train/a": np.float32(0.1), "n": jnp.int32(3)})
    writer.write(2, "stage1", {"half": jnp.bfloat16(1.5), "one": np.array([2.5])})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert lines[0][:-32] == (
    '{"step": 1, "stage": "stage1", "train/b": 0.30000000000000004, "train/a": 0.10000000149011612, "n": 3}'
  )
  assert {*lines[0][-32:]} == {" ", "\t"}  # its checksum
  assert metrics.read_metrics(tmp_path)[1] == {"step": 2, "stage": "stage1", "half": 1.5, "one": 2.5}
  assert metrics.read_metrics(tmp_path / "metrics.jsonl") == metrics.read_metrics(tmp_path)


def test_not_finite_is_null_with_a_warning(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(5, "s", {"x": math.nan, "y": 1.0, "z": -math.inf})
  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
  assert line == {"step": 5, "stage": "s", "x": None, "y": 1.0, "z": None, "warning": "not finite: x=nan, z=-inf"}
  record = metrics.read_metrics(tmp_path)[0]
  assert math.isnan(record["x"]) and math.isnan(record["z"]) and record["y"] == 1.0


@pytest.mark.parametrize("bad", [{"step": 1.0}, {"": 1.0}, {"x": np.ones(2)}, {"x": "high"}, {"x": None}])
def test_write_names_what_is_wrong(tmp_path, bad):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="metric"):
      writer.write(1, "s", bad)
  assert metrics.read_metrics(tmp_path) == []


def test_a_last_line_cut_short_is_dropped_and_mended(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "stage": "s", "x": 1.0}\n{"step": 2, "stage": "s", "x"')
  assert [record["step"] for record in metrics.read_metrics(path)] == [1]
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(2, "s", {"x": 2.0})
  first, second = path.read_text().splitlines()
  assert first == '{"step": 1, "stage": "s", "x": 1.0}' and second[:-32] == '{"step": 2, "stage": "s", "x": 2.0}'
  # Only the newline was lost: the line stays.
  path.write_text('{"step": 1, "stage": "s"}')
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(2, "s", {})
  assert [record["step"] for record in metrics.read_metrics(path)] == [1, 2]


def test_every_flipped_bit_of_a_line_is_named_or_changes_nothing_and_every_cut_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, "s", {"x": 0.1})
    writer.write(2, "s", {"x": 0.2})
  content, whole = path.read_bytes(), metrics.read_metrics(path)
  unnoticed = []
  for bit in range(8 * len(content)):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
      assert metrics.read_metrics(path) == whole
      unnoticed.append(bit // 8)
    except ValueError as error:
      assert f"{path}:" in str(error)
  assert len(unnoticed) < 8  # a last blank or line end that JSON takes for one
  for length in range(len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    if content[:length].endswith(b"}"):  # all but the checksum
      assert metrics.read_metrics(path) in (whole, whole[:1])
      continue
    assert metrics.read_metrics(path) == whole[:1]
    metrics.MetricsWriter(tmp_path, tensorboard=False).close()
    assert path.read_bytes() == content[: len(content) // 2]
  path.write_bytes(content[:-1])  # only its end is lost
  assert metrics.read_metrics(path) == whole


@pytest.mark.parametrize(
  "text", ['{"step": 1}\nnonsense\n{"step": 2}\n', '{"step": 1}\n[3]\n', '{"step": 1}\n{"x": 2}\n']
)
def test_a_bad_line_is_named(tmp_path, text):
  path = tmp_path / "metrics.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
    metrics.read_metrics(path)
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
    metrics.MetricsWriter(tmp_path)
  assert path.read_text() == text


@hypothesis.given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 10_000))
@hypothesis.settings(max_examples=40, deadline=None)
def test_killed_and_resumed_equals_uninterrupted(tmp_path_factory, steps, restored, cut):
  def run(writer, first, last):
    for step in range(first, last + 1):
      writer.write(step, "étape", {"train/loss": 1 / step})
      if step % 3 == 0:
        writer.write(step, "étape", {"eval/x": step * 0.1})

  whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
  with metrics.MetricsWriter(whole, tensorboard=False) as writer:
    run(writer, 1, steps)
  with metrics.MetricsWriter(killed, tensorboard=False) as writer:
    run(writer, 1, steps)
  # The kill loses bytes after the checkpoint of `restored`, at any place.
  restored = min(restored, steps)
  path = killed / "metrics.jsonl"
  data = path.read_bytes()
  safe = len(b"".join(l for l in data.splitlines(keepends=True) if json.loads(l)["step"] <= restored))
  path.write_bytes(data[: safe + cut % (len(data) - safe + 1)])
  with metrics.MetricsWriter(killed, tensorboard=False) as writer:
    writer.truncate(restored)
    run(writer, restored + 1, steps)
  assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert [file.name for file in killed.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_events_and_purge(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write(step, "s", {"train/loss": 0.5 * step})
    writer.image(3, "map", np.zeros((4, 4, 3), np.uint8))
  with metrics.MetricsWriter(tmp_path) as writer:  # In the same second: the first file must survive.
    writer.truncate(2)
    writer.write(3, "s", {"train/loss": 9.0})
    writer.truncate(2)
    writer.write(3, "s", {"train/loss": 8.0})
  found = [event for event in events(tmp_path / "tensorboard") if event[1] != "map"]
  assert found == [
    (1, "train/loss", 0.5), (2, "train/loss", 1.0), (3, "train/loss", 1.5),
    (3, "start", None), (3, "train/loss", 9.0),
    (3, "start", None), (3, "train/loss", 8.0),
  ]  # fmt: skip
  assert [record["train/loss"] for record in metrics.read_metrics(tmp_path)] == [0.5, 1.0, 8.0]


def test_inactive_writer_writes_nothing(tmp_path):
  with metrics.MetricsWriter(tmp_path / "run", active=False) as writer:
    writer.write(1, "s", {"x": 1.0})
    writer.image(1, "x", np.zeros((2, 2, 3), np.uint8))
    writer.truncate(0)
    writer.flush()
  assert not (tmp_path / "run").exists()


def test_throughput():
  now = [0.0]
  rate = metrics.Throughput(clock=lambda: now[0])
  now[0] = 5.0
  rate.restart()
  with pytest.raises(KeyError), rate.waiting():
    now[0] += 1.0
    raise KeyError
  now[0] += 3.0
  rate.add(6)
  rate.add(6)
  assert rate.report() == {"examples_per_second": 3.0, "data_wait_share": 0.25}
  now[0] += 1.0
  rate.add(5)
  assert rate.report() == {"examples_per_second": 5.0, "data_wait_share": 0.0}


class _Output:
  """An array of a step that is done once `ready`."""

  def __init__(self):
    self.ready = False

  def is_ready(self):
    return self.ready


def test_reading_while_a_step_runs_is_no_wait():
  now, last = [0.0], _Output()
  rate = metrics.Throughput(clock=lambda: now[0])
  with rate.waiting(last):  # the step runs all the time
    now[0] += 3.0
  with rate.waiting(last):  # it ends meanwhile: when is not known, so that all counts
    now[0] += 1.0
    last.ready = True
  now[0] += 4.0
  rate.add(8)
  assert rate.report() == {"examples_per_second": 1.0, "data_wait_share": 0.125}


def test_what_was_read_is_reported_by_source_and_modality_a_second():
  now = [10.0]
  rate = metrics.Throughput(clock=lambda: now[0])
  rate.read({"near": 8, "far": 4}, {"near": 3000, "far": 50}, {"image": 2.0, "text": 0.5})
  rate.read({"near": 8}, {"near": 1000}, {"image": 4.0})
  now[0] += 4.0
  rate.add(20)
  assert rate.report() == {
    "examples_per_second": 5.0, "data_wait_share": 0.0,
    "data/near/items_per_second": 4.0, "data/far/items_per_second": 1.0,
    "data/near/bytes_per_second": 1000.0, "data/far/bytes_per_second": 12.5,
    "data/image/read_share": 1.5, "data/text/read_share": 0.125,
  }  # fmt: skip
  now[0] += 1.0
  assert rate.report() == {"examples_per_second": 0.0, "data_wait_share": 0.0}, "a report starts the count anew"


@pytest.mark.parametrize("wait, costs, workers, message", [
  (0.1, {"image": 2.0}, 0, ""), (0.0, {}, 0, ""),
  # 3 of 4 threads' time is reading: the processor is what lacks.
  (0.4, {"image": 2.4, "text": 0.6}, 0, "input-bound: waited 40 % of the time for data (threads 4, workers 0; reading: "
   "image 80 %, text 20 %); raise config.data.workers to the number of free cores, store smaller files, or cache a "
   "frozen trunk"),
  # 3 of 8 workers' time.
  (0.25, {"audio": 0.75, "image": 2.25}, 8, "input-bound: waited 25 % of the time for data (workers 8; reading: "
   "image 75 %, audio 25 %); most of that is waiting for the disk: raise config.data.threads or workers, or copy the "
   "data nearer"),
])  # fmt: skip
def test_a_run_that_waits_for_its_data_is_told_what_to_change(wait, costs, workers, message):
  rates = {"examples_per_second": 1.0, "data_wait_share": wait, "data/near/items_per_second": 9.0}
  rates |= {f"data/{name}/read_share": value for name, value in costs.items()}
  assert metrics.input_bound(rates, workers, 4) == message


@pytest.mark.parametrize("module", [metrics, intervals, examples])
def test_docstring_examples(module):
  found = doctest.testmod(module)
  assert found.attempted and not found.failed


@pytest.mark.parametrize("right, count", [(0, 5), (3, 10), (10, 10), (431, 1000)])
def test_wilson_equals_scipy(right, count):
  expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
  found = intervals.wilson_interval(100 * right / count, count, z=1.959963984540054)
  np.testing.assert_allclose(found, (100 * expected.low, 100 * expected.high), atol=1e-9)


def test_bootstrap_interval():
  values = np.array([0.0, 100.0] * 200)
  low, high = intervals.bootstrap_interval(values)
  # Normal approximation: 50 +- 1.96 * 50 / sqrt(400) = 45.1 ... 54.9.
  assert low == pytest.approx(45.1, abs=1.0) and high == pytest.approx(54.9, abs=1.0)
  # Ten equal copies of each row are no new evidence: 400 rows in 40 groups.
  copies, groups = np.repeat(np.array([0.0, 100.0] * 20), 10), np.repeat(np.arange(40), 10)
  low, high = intervals.bootstrap_interval(copies, groups=groups)
  assert low == pytest.approx(34.5, abs=2.0) and high == pytest.approx(65.5, abs=2.0)
  assert intervals.bootstrap_interval(np.array([7.0])) == (7.0, 7.0)


def test_weighted_bootstrap_is_that_of_the_weighted_mean():
  values = np.array([100.0] * 300 + [0.0] * 100)
  # A class of 300 rows, all right, and one of 100, all wrong, weighed alike: 50 whatever rows are drawn, nearly.
  weights = np.array([1.0] * 300 + [3.0] * 100)
  low, high = intervals.bootstrap_interval(values, weights=weights)
  # Delta method for a ratio: the deviation is sqrt(sum((w (v - 50))^2)) / sum(w) = 50 sqrt(300 + 900) / 600 = 2.89.
  assert low == pytest.approx(50 - 1.96 * 2.89, abs=0.6) and high == pytest.approx(50 + 1.96 * 2.89, abs=0.6)
  assert intervals.bootstrap_interval(values, weights=np.full(400, 2.0)) == intervals.bootstrap_interval(values)
  with pytest.raises(ValueError, match="weights: expected 400 numbers above 0"):
    intervals.bootstrap_interval(values, weights=np.zeros(400))


def plain_bootstrap(values, groups, samples=4000):
  """Second implementation: draws lists of whole groups, one sample at a time."""
  rng, names = np.random.default_rng(7), np.unique(groups)
  rows = {name: values[groups == name] for name in names}
  means = [np.concatenate([rows[n] for n in rng.choice(names, len(names))]).mean() for _ in range(samples)]
  return np.quantile(means, [0.025, 0.975])


def test_grouped_bootstrap_equals_a_plain_one_and_scipy():
  rng = np.random.default_rng(3)
  sizes = rng.integers(1, 9, 60)
  groups = np.repeat([f"concept {n}" for n in range(60)], sizes)
  values = 100.0 * (rng.random(len(groups)) < np.repeat(rng.random(60), sizes))
  found = intervals.bootstrap_interval(values, groups=groups, samples=4000)
  np.testing.assert_allclose(found, plain_bootstrap(values, groups), atol=0.8)
  # SciPy draws pairs of (sum, count) of the groups, which is the same.
  sums, counts = (np.array([f(values[groups == g]) for g in np.unique(groups)]) for f in (np.sum, len))
  options = dict(paired=True, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
  other = bootstrap((sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), **options).confidence_interval
  np.testing.assert_allclose(found, other, atol=0.8)
  assert intervals.percentage_interval(values, groups=groups) == pytest.approx(
    intervals.bootstrap_interval(values, groups=groups)
  )


def test_intervals_of_percentages():
  hits = np.array([100.0] * 30 + [0.0] * 10)
  wilson = intervals.wilson_interval(75.0, 40)
  assert intervals.percentage_interval(hits) == wilson
  assert intervals.percentage_interval(hits, groups=np.arange(40)) == wilson
  # Twenty copies of two rows, one right and one wrong: drawn as two groups, all or nothing may come out.
  assert intervals.percentage_interval(np.repeat([100.0, 0.0], 20), groups=np.repeat([0, 1], 20)) == (0.0, 100.0)
  # Groups that agree by chance, or are all right, tell no more than their rows.
  assert intervals.percentage_interval(np.tile([100.0, 0.0], 4), groups=np.repeat(np.arange(4), 2)) == (
    intervals.wilson_interval(50.0, 8)
  )
  all_right = intervals.percentage_interval(np.full(8, 100.0), groups=np.repeat([0, 1], 4))
  assert all_right == intervals.wilson_interval(100.0, 8) and all_right[0] < 70
  # Three of weight 1 and one of weight 3 count as (3 + 3)^2 / (3 + 9) = 3 rows.
  weighted = intervals.percentage_interval(np.array([100.0, 100, 100, 0]), weights=np.array([1.0, 1, 1, 3]))
  assert weighted == pytest.approx(intervals.wilson_interval(50.0, 3))


def test_a_percentage_comes_with_its_rows_and_ways():
  found = dict(intervals.measured("top1", np.array([100.0, 0.0]), ways=7))
  low, high = intervals.wilson_interval(50.0, 2)
  assert found == {"top1": 50.0, "top1/n": 2.0, "top1/ways": 7.0, "top1/low": low, "top1/high": high}
  assert dict(intervals.measured("top1", np.array([100.0, 0.0]), ways=7, intervals=False)) == {"top1": 50.0}
  assert [name for name in found if not intervals.is_about(name)] == ["top1"]


def test_intervals_reject():
  for percent, count in [(101.0, 5), (-1.0, 5), (50.0, 0)]:
    with pytest.raises(ValueError, match="percent|count"):
      intervals.wilson_interval(percent, count)
  for bad in (np.zeros(0), np.zeros((2, 2)), np.array([np.nan])):
    with pytest.raises(ValueError, match="values"):
      intervals.bootstrap_interval(bad)
  with pytest.raises(ValueError, match="lengths"):
    intervals.bootstrap_interval(np.zeros(3), groups=np.zeros(2))


def test_without_a_terminal_progress_is_a_line(caplog, monkeypatch):
  caplog.set_level(logging.INFO, "absl")
  stage = dataclasses.replace(config_lib.read(stage1.get_config()).ordered[0], sources=schema.Frozen({"icons": 80}))
  stage = dataclasses.replace(stage, first_step=0, steps=100)
  monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
  log_progress(stage, 20, 1.5, 40.0)
  assert f"bridges: step 20 of {stage.last_step}, loss 1.5000, 40.0 rows/s, 0:02:40 left" in caplog.text
  monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
  caplog.clear()
  log_progress(stage, 20, 1.5, 40.0)
  assert not caplog.text


def test_phases_add_up_and_an_inner_one_stops_the_outer():
  ticks = iter([0.0, 1.0, 4.0, 6.0, 10.0, 15.0, 20.0, 21.0])
  phases = metrics.Phases(clock=lambda: next(ticks))
  with phases("data"):  # 0 to 1
    pass
  with phases("stage"):  # 4 to 6, 10 to 15
    with phases("compile"):  # 6 to 10
      pass
  with pytest.raises(ValueError), phases("data"):  # 20 to 21
    raise ValueError
  assert list(phases.seconds.items()) == [("data", 2.0), ("stage", 7.0), ("compile", 4.0)]


def test_waiting_is_counted_over_restarts():
  ticks = iter([0.0, 1.0, 3.0, 3.0, 4.0, 4.5])
  rate = metrics.Throughput(clock=lambda: next(ticks))
  with rate.waiting():
    pass
  rate.restart()
  with rate.waiting():
    pass
  assert rate.waited == 2.5
