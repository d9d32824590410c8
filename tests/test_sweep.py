"""A sweep: its grid, what it refuses before any run, its table by hand, and real runs that share a folder."""

import dataclasses
import fcntl
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags

from codebind_jax import files
from codebind_jax.schema import Frozen
from codebind_jax.tools import runs, sweep
from tests.train_fixtures import tiny_config

STAGE1 = str(pathlib.Path(__file__).parents[1] / "configs" / "stage1.py:runlocal")


@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("1", ["1"]), ("1,2", ["1", "2"]), ("1e-3, 3e-3", ["1e-3", "3e-3"]), ("", [""]),
    ("(1,2),(3,)", ["(1,2)", "(3,)"]), ('("a","b"),("c",)', ['("a","b")', '("c",)']),
    ('"a,b.txt",c.txt', ["a,b.txt", "c.txt"]), ("'a, b'", ["a, b"]), ("'',x", ["", "x"]),
    ('{"kind": "photo", "area": (0.5, 1)},{}', ['{"kind": "photo", "area": (0.5, 1)}', "{}"]),
    ('("a)","(b"),x', ['("a)","(b")', "x"]), ('"a" or "b",c', ['"a" or "b"', "c"]),
  ],
)  # fmt: skip
def test_commas_outside_quotes_and_brackets_separate_values(text, values):
  assert sweep.split(text) == values


@pytest.mark.parametrize(("text", "message"), [("(1,2", r"in which \) is missing"), ("'a,b", "in which ' is missing"),
                                               ("1,,2", "a value is empty"), ("1,", "a value is empty")])  # fmt: skip
def test_a_list_that_is_not_closed_or_has_a_gap_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    sweep.split(text)


def test_a_grid_has_every_combination_in_folders_that_bear_the_values():
  grid = sweep.grid_of(["--config=f.py:x", "--config.optim.learning_rate=1e-3,3e-3", "--config.steps=2",
                        "-config.codebook.dim=2,4"])  # fmt: skip
  assert grid.file == "f.py:x" and grid.fixed == {"steps": "2", "test": "False"}
  assert list(grid.points) == ["learning_rate=1e-3,dim=2", "learning_rate=1e-3,dim=4", "learning_rate=3e-3,dim=2",
                               "learning_rate=3e-3,dim=4"]  # fmt: skip
  assert grid.points["learning_rate=3e-3,dim=2"] == {"optim.learning_rate": "3e-3", "codebook.dim": "2"}


def test_folders_of_other_values_have_other_names():
  grid = sweep.Grid("f.py", {}, {"stages.a.chunk": ("1", "2"), "stages.b.chunk": ("1", "2")})
  assert len(grid.points) == 4 and "stages.a.chunk=1,stages.b.chunk=2" in grid.points
  names = list(sweep.Grid("f.py", {}, {"data.files": ("a/b", "a b", "a-b", "x" * 300, "x" * 301)}).points)
  assert len(set(names)) == 5 and names[2] == "files=a-b"
  assert all("/" not in name and " " not in name and len(name) <= 100 for name in names)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.steps=1,2"], "--config=FILE.py and --workdir=DIR are both needed"),
    (["--config=f.py", "--config.steps=1"], "no key has several values"),
    (["--config=f.py", "--config.steps=1,1"], "--config.steps: '1' is there twice"),
    (["--config=f.py", "--config.steps=(1,2"], r"--config.steps: got '\(1,2', in which \) is missing"),
    (["--config=f.py", "--config.test=True,False"], "--config.test: is not allowed; a sweep reads no test sets"),
    (["--config=f.py", "steps=1,2"], "steps=1,2: is not allowed"),
    (["--config=f.py", "--config.baseline"], "--config.baseline: is not allowed; allowed: --config=FILE.py and"),
  ],
)
def test_what_is_no_grid_is_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    sweep.grid_of(arguments)


def test_values_have_the_types_that_main_gives_them_and_modules_bring_their_options():
  config = sweep.config_of(STAGE1, {"steps": "3", "data.worlds": '("icons","household")', "baseline": "false",
                                    "optim.learning_rate": "1e-2", "data.root": "1"})  # fmt: skip
  assert (config.steps, config.data.worlds, config.baseline) == (3, ("icons", "household"), False)
  assert config.optim.learning_rate == 0.01 and config.data.root == "1"
  config = sweep.config_of(STAGE1, {"method": "dcid", "method_options.codes": "8"})
  assert config.method_options.codes == 8 and not config.stages.bridges.losses
  config = sweep.config_of(STAGE1, {"stages.bridges.losses.reconstruction": "0.5"})  # which the file does not list
  assert config.stages.bridges.losses.reconstruction == 0.5


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    (STAGE1, {"optim.learning_rat": "1"}, "config.optim.learning_rat: unknown key 'learning_rat'; allowed: "),
    (STAGE1, {"steps": "many"}, "steps.*many"),
    ("nowhere.py", {"steps": "1"}, "there is no such file"),
    (STAGE1.replace("runlocal", "fast"), {"steps": "1"}, "unknown argument; allowed: runlocal"),
  ],
)
def test_a_misspelt_key_or_value_is_one_line_before_any_run(file, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    sweep.config_of(file, changes)
  assert "\n" not in str(error.value)


FINAL = {"eval/w/zeroshot/image/top1": 50.0, "eval/w_a/zeroshot/image/top1": 40.0, "eval/w_b/zeroshot/image/top1": 60.0,
         "eval/w_b/zeroshot/image/style=x/top1": 1.0, "eval/v/zeroshot/audio/top1": 20.0, "train/total": 3.0,
         "eval/v_val/zeroshot/audio/top1": 20.0, "eval/w_a/retrieval/text_to_image/r5": 90.0}  # fmt: skip


def test_the_score_is_the_mean_of_the_worlds_validation_metrics_or_of_those_asked_for():
  assert sweep.scored(FINAL) == {"eval/w/zeroshot/image/top1": 50.0, "eval/v/zeroshot/audio/top1": 20.0}
  assert sweep.scored(FINAL, ["eval/*/r5", "eval/w_b/*/top1"]) == {
    "eval/w_a/retrieval/text_to_image/r5": 90.0, "eval/w_b/zeroshot/image/top1": 60.0}  # fmt: skip
  without = {name: value for name, value in FINAL.items() if "zeroshot" not in name}
  assert sweep.scored(without) == {"eval/w_a/retrieval/text_to_image/r5": 90.0}
  with pytest.raises(ValueError, match=r"none of \['eval/x'\] was measured on validation sets; there are"):
    sweep.scored(FINAL, ["eval/x"])


def test_the_table_marks_the_best_and_says_what_is_at_the_edge_left_or_diverged():
  grid = sweep.Grid("f.py", {"test": "False"}, {"optim.learning_rate": ("1e-3", "1e-2", "1e-1"), "method": ("a", "b")})
  score = lambda value, plain: {"eval/w/zeroshot/image/top1": value, "baseline/eval/w/zeroshot/image/top1": plain}
  names = list(grid.points)
  done = {names[0]: score(1.0, 5.0), names[1]: score(2.0, 5.0), names[2]: score(4.25, 5.0), names[3]: {}}
  found = sweep.summary(grid, done)
  assert found["best"] == "learning_rate=1e-2,method=a" and found["edges"] == {}
  assert sweep.text_of(found).splitlines() == [
    "| `optim.learning_rate` | `method` | score | baseline |", "|---|---|---|---|",
    "| 1e-3 | a | 1.00 | 5.00 |", "| 1e-3 | b | 2.00 | 5.00 |", "| 1e-2 | a | **4.25** | 5.00 |",
    "| 1e-2 | b | diverged |  |", "| 1e-1 | a | left |  |", "| 1e-1 | b | left |  |", "",
    "Mean of `eval/w/zeroshot/image/top1` on the validation sets; test sets were not read.",
    "Best: `learning_rate=1e-2,method=a`.",
    "Not finished, or in other processes' hands: learning_rate=1e-1,method=a, learning_rate=1e-1,method=b.",
  ]  # fmt: skip
  edge = sweep.summary(grid, done | {names[5]: score(9.0, 5.0)})
  assert edge["edges"] == {"optim.learning_rate": "1e-1"}
  assert "The best `optim.learning_rate`, 1e-1, is at the edge of the values tried" in sweep.text_of(edge)
  assert "diverged" in sweep.text_of(sweep.summary(grid, {names[0]: {}}))


def test_own_flags_are_parsed_and_the_config_s_are_left():
  own = flags.FlagValues()
  argv = ["sweep", "--config", "f.py", "--workdir=w", "--config.steps", "1,2", "--parallel=2", "--config.seed=3"]
  flags.DEFINE_string("workdir", "", "", flag_values=own)
  flags.DEFINE_integer("parallel", 1, "", flag_values=own)
  assert sweep.own_flags(argv, own) == ["sweep", "--config=f.py", "--config.steps=1,2", "--config.seed=3"]
  assert (own.workdir, own.parallel) == ("w", 2)
  with pytest.raises(SystemExit, match="error: Unknown command line flag 'paralel'"):
    sweep.own_flags(["sweep", "--paralel=2"], own)


def test_the_command_ends_with_one_line_before_anything_is_made(tmp_path):
  command = [sys.executable, "-m", "codebind_jax.tools.sweep", f"--config={STAGE1}", f"--workdir={tmp_path / 'w'}",
             "--config.optim.rate=1,2"]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(STAGE1).parents[1])
  assert done.returncode == 1 and not (tmp_path / "w").exists()
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: config.optim.rate: unknown key 'rate'; allowed: ")


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
  """A sweep of two values and two steps, one of which another process has taken at first."""
  folder = files.path(tmp_path_factory.mktemp("sweep"))
  grid = sweep.Grid("tiny", {}, {"optim.learning_rate": ("1e-3", "1e-2")})
  configs = {name: tiny_config(*data, **{"optim.learning_rate": float(point["optim.learning_rate"]), "steps": 2,
                                         "test": False}) for name, point in grid.points.items()}  # fmt: skip
  valid = runs.checked(configs, folder)
  (folder / runs.LOCKS).mkdir()
  with open(folder / runs.LOCKS / "learning_rate=1e-3", "w") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    first = runs.train_all(valid, folder)
  times = {path: path.stat().st_mtime_ns for path in (folder / "learning_rate=1e-2").rglob("*") if path.is_file()}
  return folder, grid, valid, first, runs.train_all(valid, folder), times


def test_a_run_in_other_hands_is_left_and_a_finished_one_is_not_trained_again(swept):
  folder, grid, valid, first, second, times = swept
  assert list(first) == ["learning_rate=1e-2"] and list(second) == list(grid.points)
  assert first["learning_rate=1e-2"] == second["learning_rate=1e-2"]
  assert times == {path: path.stat().st_mtime_ns for path in times}
  assert "Not finished, or in other processes' hands: learning_rate=1e-3." in sweep.text_of(sweep.summary(grid, first))


def test_a_run_of_fewer_steps_or_without_its_baseline_or_report_is_not_finished(swept, tmp_path):
  folder, _, valid, _, second, _ = swept
  name = "learning_rate=1e-2"
  config, longer = valid[name], dataclasses.replace(valid[name].stages["bridges"], steps=3)
  assert runs.outcome(folder / name, config) == second[name]
  assert runs.outcome(folder / name, dataclasses.replace(config, stages=Frozen(bridges=longer))) is None
  assert runs.outcome(folder / name, dataclasses.replace(config, baseline=True)) is None
  shutil.copy(folder / name / "metrics.jsonl", tmp_path)
  assert runs.outcome(tmp_path, config) is None
  (tmp_path / "report.html").touch()
  shutil.copytree(tmp_path, tmp_path / "baseline")
  found = runs.outcome(tmp_path, dataclasses.replace(config, baseline=True))
  assert found == second[name] | {f"baseline/{metric}": value for metric, value in second[name].items()}


def test_only_validation_sets_are_read(swept):
  folder, grid, _, _, done, _ = swept
  found = sweep.summary(grid, done)
  assert all(not name.startswith("eval/squares_test") for metrics in done.values() for name in metrics)
  assert found["runs"][0]["parts"] == {
    "eval/squares/zeroshot/image/top1": done["learning_rate=1e-3"]["eval/squares_val/zeroshot/image/top1"]}  # fmt: skip
  json.dumps(found)


def test_a_folder_of_another_sweep_is_refused_before_any_run(swept, data):
  folder, _, _, _, done, _ = swept
  other = tiny_config(*data, steps=2, test=False, **{"optim.learning_rate": 0.5})
  with pytest.raises(ValueError, match="optim.learning_rate: 0.001 -> 0.5"):
    runs.checked({"learning_rate=1e-3": other}, folder)
  with pytest.raises(ValueError, match="config.mode: got 'eval'; allowed: 'train'"):
    with other.unlocked():
      other.mode, other.init_from = "eval", "x"
    runs.checked({"new": other}, folder)


def test_a_run_that_diverges_is_noted_and_the_others_go_on(swept, data, tmp_path, monkeypatch):
  _, _, valid, _, _, _ = swept
  trained = []

  def train_and_evaluate(config, folder):
    trained.append(folder.name)
    if config.optim.learning_rate == 1e-3:
      raise FloatingPointError("step 2 is not finite")
    raise OSError("disk full")

  monkeypatch.setattr("codebind_jax.train.train_and_evaluate", train_and_evaluate)
  folder = files.path(tmp_path)
  for name in valid:
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match="learning_rate=1e-2: disk full"):
    runs.train(valid, folder)
  assert runs.outcome(folder / "learning_rate=1e-3", valid["learning_rate=1e-3"]) == {}
  with pytest.raises(ValueError, match="disk full"):
    runs.train(valid, folder)
  assert trained == ["learning_rate=1e-3", "learning_rate=1e-2", "learning_rate=1e-2"]
  with pytest.raises(ValueError, match="--parallel: got 2 for 's3://.*allowed: 1"):
    runs.train_all(valid, files.path("s3://bucket/sweep"), parallel=2)


@pytest.mark.slow
def test_processes_share_the_runs(swept, tmp_path):
  _, grid, valid, _, done, _ = swept
  folder = files.path(tmp_path)
  runs.checked(valid, folder)
  assert runs.train_all(valid, folder, parallel=2) == done
