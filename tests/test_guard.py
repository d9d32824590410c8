"""A step that is not finite, and SIGTERM."""

import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from codebind_jax import main
from codebind_jax.runtime.guard import DUMP
from codebind_jax.runtime.signals import Preempted
from codebind_jax.runtime.train_state import TrainState, advance
from codebind_jax.train import train_and_evaluate
from tests.processes import assert_same_run, started
from tests.train_fixtures import arrays_of, lines_of, tiny_config

TERMINATED_AT_3 = """
import itertools, os, runpy, signal
from codebind_jax.runtime import signals
asked, steps = signals.reached, itertools.count(1)
def reached():
  if next(steps) == 3:
    os.kill(os.getpid(), signal.SIGTERM)
  return asked()
signals.reached = reached
runpy.run_module("codebind_jax.main", run_name="__main__")
"""


def saved(workdir):
  """Steps there are checkpoints of."""
  return sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_terminated_run_saves_exits_with_0_and_resumes_bit_for_bit(data, whole_run, tmp_path):
  workdir = tmp_path / "terminated"
  arguments = [f"--config=tests/tiny.py:{data[0]},{data[1]}", f"--workdir={workdir}"]
  command = [sys.executable, "-c", TERMINATED_AT_3, *arguments]
  process = started(command)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "stopped after step 3 of stage 'bridges', state saved" in err
  assert saved(workdir) == ["2", "3"]
  assert lines_of(workdir)[-1]["step"] == 3
  train_and_evaluate(tiny_config(*data), workdir)
  assert_same_run(workdir, whole_run[0])


@pytest.mark.parametrize("code", [0, 75])
def test_exit_code_of_a_run_that_was_stopped(data, monkeypatch, code):
  def stopped(*_):
    raise Preempted("stopped")

  monkeypatch.setattr("codebind_jax.train.train_and_evaluate", stopped)
  monkeypatch.setattr(main, "_CONFIG", type("Flag", (), {"value": tiny_config(*data)}))
  with flagsaver.flagsaver(workdir="unused", stopped_exit_code=code), pytest.raises(SystemExit) as end:
    main.main([])
  assert end.value.code == code


def test_a_step_that_is_not_finite_stops_the_run_and_can_be_done_again(data, tmp_path):
  explode = {"optim.learning_rate": 1e38, "optim.warmup": 0, "log_steps": 4, "checkpoint_steps": 100, "eval_steps": 100}
  config = tiny_config(*data, **explode)
  found = r"stage 'bridges', step (\d+) \(found in steps 1 to 4\): not finite: .*train/total"
  with pytest.raises(FloatingPointError, match=found) as first:
    train_and_evaluate(config, tmp_path / "run")
  step = int(str(first.value).split("step ")[1].split()[0])
  assert step > 1
  assert not saved(tmp_path / "run"), "a state that is not finite was saved"
  dump = tmp_path / "again"
  shutil.copytree(tmp_path / "run" / DUMP, dump)
  assert saved(dump) == [str(step - 1)]
  assert all(np.isfinite(leaf).all() for leaf in arrays_of(dump).values())
  with pytest.raises(FloatingPointError) as second:
    train_and_evaluate(config, dump)
  terms = lambda error: str(error.value).split("not finite: ")[1].split(";")[0]
  assert f"step {step} (found in steps {step} to" in str(second.value)
  assert terms(first) == terms(second)
  with np.load(tmp_path / "run" / DUMP / "batch.npz") as one, np.load(dump / DUMP / "batch.npz") as other:
    assert "squares/image" in one.files
    for name in one.files:
      np.testing.assert_array_equal(one[name], other[name])


def test_advance_keeps_the_state_before_a_bad_step_whatever_follows():
  state = TrainState(jnp.int32(7), {"w": jnp.float32(1.0)}, {}, (), {}, jnp.zeros(2))
  after = lambda s, w: s.replace(step=s.step + 1, params={"w": jnp.float32(w)})
  good = advance(state, after(state, 2.0), jnp.bool_(True))
  assert (int(good.step), float(good.params["w"])) == (8, 2.0)
  bad = advance(good, after(good, np.nan), jnp.bool_(False))
  assert (~int(bad.step), float(bad.params["w"])) == (8, 2.0)
  later = advance(bad, after(bad, 3.0), jnp.bool_(True))
  assert (~int(later.step), float(later.params["w"])) == (8, 2.0)
