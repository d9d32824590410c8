"""The trainer as users run it: a shipped config, shrunk; killed and resumed; on several devices; with bad input."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import codebind_jax
from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.config import validation
from codebind_jax.runtime.checkpoint import Checkpoints
from codebind_jax.runtime.optim import param_paths
from codebind_jax.train import baseline_of, open_run, train_and_evaluate, warn_of_collapse
from tests.processes import REPOSITORY, assert_close, assert_same_run, finish, start, started, wait_for
from tests.train_fixtures import arrays_of, lines_of, tiny_config


def test_run_writes_what_it_promises(whole_run):
  workdir, final = whole_run
  lines = lines_of(workdir)
  assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
  assert lines[-1]["stage"] == "final"
  assert {"train/info_nce", "train/commitment", "codebook/shared/perplexity", "codebook/image/dead"} <= lines[0].keys()
  for name in ("eval/squares/zeroshot/image/top1", "eval/squares_test/retrieval/text_to_image/r1",
               "eval/squares_test/ncm/image/full", "eval/squares_test/probe/label/image/shared",
               "eval/train/codebook/shared/dead"):
    assert name in final, sorted(final)
  assert (workdir / "report.html").stat().st_size > 1000
  assert list((workdir / "tensorboard").glob("events*"))
  store = Checkpoints(workdir)
  assert sorted(path.name for path in store.path.iterdir()) == ["4", "6"], "as many as keep_checkpoints"
  assert store.read_meta()["position"]["step"] == 6 and int(store.read_arrays(("step",))["step"]) == 6
  store.close()
  while_training = [name for name in lines[3] if name.startswith("eval/")]
  assert "eval/squares_val/zeroshot/image/top1" in while_training
  assert not any("squares_test" in name or "/low" in name for name in while_training), while_training


def test_training_moves_heads_and_codebooks_but_only_what_the_stage_trains(data, tmp_path):
  once = {"steps": 2, "checkpoint_steps": 1, "eval_steps": 2, "optim.warmup": 0}
  train_and_evaluate(tiny_config(*data, **once, **{"stages.bridges.train": ("image/.*",)}), tmp_path)
  after = arrays_of(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  before = arrays_of(tmp_path)
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  assert {"params/image/shared/proj/kernel", "params/image/specific/proj/kernel", "codebooks/shared/codes"} <= moved
  assert not any(path.startswith("params/text") for path in moved)


def test_killed_run_resumes_bit_for_bit(data, whole_run, tmp_path):
  workdir = tmp_path / "killed"
  process = start(data, workdir)
  try:
    metrics = workdir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5)
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert 5 <= len(lines_of_partial(workdir)) < 8, "the kill came too late to test anything"
  train_and_evaluate(tiny_config(*data), workdir)
  assert_same_run(whole_run[0], workdir)


@pytest.mark.slow  # test_batches.py has workers that start at any step
def test_killed_run_with_workers_resumes_bit_for_bit(data, whole_run, tmp_path):
  command = [sys.executable, "-m", "codebind_jax.main", f"--config=tests/tiny.py:{data[0]},{data[1]}",
             f"--workdir={tmp_path / 'killed'}", "--config.data.workers=2"]  # fmt: skip
  process, metrics = started(command), tmp_path / "killed" / "metrics.jsonl"
  try:
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert 3 <= len(lines_of_partial(tmp_path / "killed")) < 8, "the kill came too late to test anything"
  finish(started(command))
  assert_same_run(whole_run[0], tmp_path / "killed")


def test_a_second_training_in_a_folder_is_refused_and_a_load_disturbs_nothing(data, whole_run, tmp_path):
  process, folder = start(data, tmp_path / "run"), tmp_path / "run"
  wait_for(process, lambda: (folder / "checkpoints" / "2").is_dir())
  codebind_jax.load(folder)
  process.send_signal(signal.SIGSTOP)  # so that it is there for sure
  with pytest.raises(ValueError, match=f"{folder}: process {process.pid} on .* trains here since .*; allowed: one"):
    train_and_evaluate(tiny_config(*data), folder)
  process.send_signal(signal.SIGCONT)
  codebind_jax.load(folder)
  finish(process)
  assert_same_run(whole_run[0], folder)
  assert not list(folder.glob(".writer*"))


def test_a_finished_run_does_not_begin_again_without_its_checkpoints(data, whole_run, tmp_path):
  folder = shutil.copytree(whole_run[0], tmp_path / "run")
  shutil.rmtree(folder / "checkpoints")
  lines = (folder / "metrics.jsonl").read_bytes()
  with pytest.raises(RuntimeError, match="has no checkpoint, but .* is of a run that had one at step 2; put back"):
    train_and_evaluate(tiny_config(*data), folder)
  assert (folder / "metrics.jsonl").read_bytes() == lines


def lines_of_partial(workdir):
  return (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]


def test_finished_run_is_only_reported_again(data, whole_run, tmp_path):
  workdir = tmp_path / "copy"
  shutil.copytree(whole_run[0], workdir)
  (workdir / "report.html").unlink()
  assert train_and_evaluate(tiny_config(*data), workdir) == whole_run[1]
  assert_same_run(whole_run[0], workdir)
  assert (workdir / "report.html").exists()


def test_checkpoint_cut_short_falls_back_to_the_one_before(data, whole_run, tmp_path, caplog):
  workdir = tmp_path / "cut"
  shutil.copytree(whole_run[0], workdir)
  newest = workdir / "checkpoints" / "6"
  largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  train_and_evaluate(tiny_config(*data), workdir)
  assert "checkpoints/6 cannot be read, trying the one before it" in caplog.text
  assert (workdir / "checkpoints" / "6.damaged").is_dir()
  assert_same_run(whole_run[0], workdir)


@pytest.mark.parametrize("target, message", [
    (lambda at: {"step": jax.ShapeDtypeStruct((), "int32")}, "checkpoints/6 holds other arrays .*codes: 'float32"),
    (lambda at: {}[at.stage], "bridges")])  # fmt: skip
def test_a_whole_checkpoint_that_does_not_fit_is_an_error_and_stays(whole_run, tmp_path, target, message):
  shutil.copytree(whole_run[0] / "checkpoints", tmp_path / "checkpoints")
  with contextlib.closing(Checkpoints(tmp_path)) as store, pytest.raises((ValueError, KeyError), match=message):
    store.restore(target)
  assert (tmp_path / "checkpoints" / "6").is_dir()


def drop_record(manifest):
  manifest.write_text("".join(line + "\n" for line in manifest.read_text().splitlines() if '"id": "red1"' not in line))


def rename_label(manifest):
  manifest.write_text(manifest.read_text().replace('"label": "gray"', '"label": "grey"'))


def take_caption(manifest):
  manifest.write_text(manifest.read_text().replace('["red", "red square"]', '["red", "scarlet square"]', 1))


def swap_picture(manifest):
  shutil.copy(manifest.parent / "red0.png", manifest.parent / "blue0.png")


@pytest.mark.parametrize("change, message", [
    (drop_record, "rows: 24 -> 23"), (rename_label, "files.squares: '"),
    (take_caption, "items of text: '"), (swap_picture, "items of image: '"),
    (None, "rows of a batch: 8 -> 4")])  # fmt: skip
def test_a_run_does_not_go_on_with_other_data_or_another_mixture(data, whole_run, tmp_path, change, message):
  workdir, manifest = tmp_path / "run", tmp_path / "squares" / "squares.jsonl"
  shutil.copytree(whole_run[0], workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  shutil.copytree(data[0].parent, manifest.parent)
  options = {} if change else {"batch_size": 4}
  config = tiny_config(manifest, data[1], **options)
  (workdir / "config.json").write_text(json.dumps(schema.to_plain(config)))  # the run is asked to go on with this one
  if change:
    change(manifest)
  state = lambda: {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in workdir.rglob("*")}
  before = state()
  with pytest.raises(ValueError, match=rf"run in '.*' was trained on other data .*bridges\.squares\.{message}"):
    train_and_evaluate(config, workdir)
  assert state() == before


def test_no_space_for_a_checkpoint_is_an_error_and_the_run_can_be_continued(data, whole_run, tmp_path):
  files = [f for f in (whole_run[0] / "checkpoints").rglob("*") if f.is_file()]
  process = start(data, tmp_path / "full", largest_file=max(f.stat().st_size for f in files) // 2)
  _, err = process.communicate(timeout=300)
  assert process.returncode != 0 and "File too large" in err, err[-4000:]
  train_and_evaluate(tiny_config(*data), tmp_path / "full")
  assert_same_run(whole_run[0], tmp_path / "full")


@pytest.mark.slow  # test_sharding.py has eight devices without the trainer, test_multiprocess.py the trainer on four
def test_eight_devices_equal_one(data, whole_run, tmp_path):
  finish(start(data, tmp_path / "eight", devices=8))
  assert_close(whole_run[0], tmp_path / "eight")


def test_a_runs_folder_is_read_wherever_it_is_and_nothing_is_written_to_it(data, whole_run, tmp_path, monkeypatch):
  want = codebind_jax.load(whole_run[0]).embed({"text": ["red"]})["text"].shared
  there = shutil.copytree(whole_run[0], tmp_path / "a run ü")
  everything = [*there.rglob("*"), there]
  for path in everything:
    path.chmod(0o555 if path.is_dir() else 0o444)
  before = {path: path.stat().st_mtime_ns for path in everything}
  monkeypatch.chdir(tmp_path)
  for name in (there, f"{there}/", "a run ü", "./a run ü/"):
    np.testing.assert_array_equal(codebind_jax.load(name).embed({"text": ["red"]})["text"].shared, want)
  assert {path: path.stat().st_mtime_ns for path in [*there.rglob("*"), there]} == before
  for path in [there, *there.rglob("*")]:
    path.chmod(0o755)


def test_baseline_has_only_info_nce(data):
  plain = baseline_of(config_lib.read(tiny_config(*data)))
  assert not plain.model.quantize and list(plain.stages["bridges"].losses) == ["info_nce"]


def test_load_and_embed(data, whole_run):
  model = codebind_jax.load(whole_run[0])
  files = [data[0].parent / "red0.png", data[0].parent / "blue1.png"]
  out = model.embed({"image": files, "text": ["red", "blue", "a blue square"]})
  assert out["image"].shared.shape == (2, 16) and out["text"].shared.shape == (3, 16)
  assert out["image"].codes.shape == (2, 16) and out["text"].specific.shape == (3, 0)
  np.testing.assert_allclose(np.linalg.norm(out["image"].full, axis=1), 1.0, atol=1e-5)
  alone = model.embed({"image": files[1:]})["image"]
  np.testing.assert_allclose(alone.shared[0], out["image"].shared[1], atol=1e-5)
  assert [label for label, _ in model.classify(files[:1], ["red", "blue"])[0]] in (["red", "blue"], ["blue", "red"])
  fingerprint = model.fingerprint(["image", "text"])
  shared = model.codebooks["shared"]
  model.codebooks = model.codebooks | {"shared": shared.replace(codes=shared.codes + 1)}
  assert model.fingerprint(["image", "text"]) != fingerprint == codebind_jax.load(whole_run[0]).fingerprint(
    ["image", "text"]
  )
  with pytest.raises(ValueError, match=r"'audio' is not in this model; it has \['image', 'text'\]"):
    model.embed({"audio": ["x.wav"]})
  with pytest.raises(ValueError, match=r"image\[1\]"):
    model.embed({"image": [files[0], data[0]]})
  with pytest.raises(ValueError, match="no supported checkpoint"):
    codebind_jax.load(data[0].parent)


def test_workdir_of_another_config_is_refused_once_a_step_was_made(data, whole_run, tmp_path):
  open_run(config_lib.read(tiny_config(*data, batch_size=4)), tmp_path)
  open_run(config_lib.read(tiny_config(*data)), tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8
  with pytest.raises(ValueError, match=r"batch_size: 8 -> 4; use another one"):
    open_run(config_lib.read(tiny_config(*data, batch_size=4)), tmp_path, strict=True)
  folder = tmp_path / "run"
  shutil.copytree(whole_run[0], folder)
  with pytest.raises(ValueError, match=r"batch_size: 8 -> 4; .* --config.init_from="):
    open_run(config_lib.read(tiny_config(*data, batch_size=4)), folder)
  with pytest.raises(ValueError, match=r"stages.bridges.steps: 6 -> 5"):
    open_run(config_lib.read(tiny_config(*data, steps=5)), folder)
  harmless = {"data.workers": 2, "data.threads": 1, "log_steps": 7, "eval_steps": 9, "keep_checkpoints": 5}
  open_run(config_lib.read(tiny_config(*data, **harmless)), folder)
  assert json.loads((folder / "config.json").read_text())["keep_checkpoints"] == 5


def test_a_finished_run_goes_on_to_more_steps(data, whole_run, tmp_path):
  """From its last checkpoint: its lines of metrics stay, and a final evaluation is made of the later step."""
  folder = tmp_path / "run"
  shutil.copytree(whole_run[0], folder)
  before = lines_of(folder)
  train_and_evaluate(tiny_config(*data, steps=8, eval_steps=100), folder)
  after = lines_of(folder)
  assert after[: len(before)] == before and before[-1]["step"] == 6
  assert [line["step"] for line in after[len(before) :]] == [7, 8, 8] and after[-1]["stage"] == "final"


def test_batch_larger_than_the_data(data, tmp_path):
  with pytest.raises(ValueError, match="batch_size: 9 rows .* 8 distinct labels .* up to 8, or config"):
    train_and_evaluate(tiny_config(*data, batch_size=9), tmp_path)


def never(*_, **__):
  raise AssertionError("work was begun")


@pytest.mark.parametrize("overrides, message", [
  ({"stages.bridges.pairs": (("image", "text"), ("image", "depth"))},
   "config.stages.bridges.pairs: no training record has 'depth'; the data has squares: image, text"),
  ({"batch_size": 9}, "config.batch_size: 9 rows of a batch are of 'squares', which has 8 distinct labels"),
  ({"init_from": "/nowhere"}, "config.init_from: '/nowhere': no such file or folder"),
])  # fmt: skip
def test_what_can_be_known_early_fails_before_encoders_are_made(data, tmp_path, monkeypatch, overrides, message):
  monkeypatch.setattr("codebind_jax.train.Feeder", never)
  config = tiny_config(*data, **{key: value for key, value in overrides.items() if "pairs" not in key}).unlock()
  if "stages.bridges.pairs" in overrides:
    config.model.towers.depth = config.model.towers.image.copy_and_resolve_references()
    config.model.towers.depth.augment, config.model.towers.depth.views = {}, 1
    config.codebook.codes.depth = 8
    config.stages.bridges.pairs = overrides["stages.bridges.pairs"]
  with pytest.raises(ValueError, match=message):
    train_and_evaluate(config, tmp_path / "run")


def test_a_model_of_other_towers_is_refused_before_encoders_are_made(data, whole_run, tmp_path, monkeypatch):
  monkeypatch.setattr("codebind_jax.train.Feeder", never)
  config = tiny_config(*data, **{"init_from": str(whole_run[0]), "model.towers.image.specific_dim": 8})
  with pytest.raises(ValueError, match="config.model.towers.image.specific_dim: got 8, but config.init_from .* has 16"):
    train_and_evaluate(config, tmp_path / "run")
  empty = tmp_path / "empty"
  (empty / "checkpoints").mkdir(parents=True)
  config = tiny_config(*data, init_from=str(empty))
  with pytest.raises(ValueError, match="config.init_from: .*empty: a run without a checkpoint"):
    train_and_evaluate(config, tmp_path / "run")


def test_a_disk_without_room_is_named_before_the_first_step(data, tmp_path, monkeypatch):
  """First the tokens' disk, then the run's; both in bytes that are needed."""
  full = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr("shutil.disk_usage", lambda path: full)
  with pytest.raises(OSError, match="no space: the image tokens of 24 items .config.data.root or CODEBIND_DATA"):
    train_and_evaluate(tiny_config(data[0], tmp_path / "root"), tmp_path / "run")
  monkeypatch.setattr("shutil.disk_usage", lambda path: full if str(path).startswith(str(tmp_path / "run")) else real)
  real = full._replace(free=1 << 40)
  with pytest.raises(OSError, match="no space: 2 checkpoints .config.keep_checkpoints. need 0.00 GB"):
    train_and_evaluate(tiny_config(*data), tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("mode", "fly", "'fly' is not allowed; allowed: .'train', 'eval', 'embed', 'compare', 'compile'"),
    ("steps", 0, "config.steps: got 0; allowed: any number above 0"),
    ("codebook.distance", "manhattan", "config.codebook.distance: 'manhattan' is not allowed"),
    ("data.extra", 1.0, "config.data.extra: got 1.0; allowed: 0 .none. up to, not including, 1"),
    ("data.workers", -1, "config.data.workers: got -1; allowed: 0 and up"),
    ("data.threads", 0, "config.data.threads: got 0; allowed: any number above 0"),
    ("codebook.decay", 1.5, "config.codebook.decay: got 1.5; allowed: 0 to 1"),
    ("data.captions", "some", "config.data.captions: .some. is not allowed; allowed: .*joined"),
    ("tasks", ("zeroshot", "smell"), "config.tasks: .smell. is not allowed; allowed: .*codes"),
    ("model.towers.text.whiten", -0.1, "config.model.towers.text.whiten: got -0.1; allowed: 0 .off. to 1"),
    ("stages.bridges.chunk", -1, "config.stages.bridges.chunk: got -1; allowed: 0 .the whole matrix. and up"),
    ("stages.bridges.parts", 0, "config.stages.bridges.parts: got 0; allowed: 1 and up"),
    ("optim.accumulate", 4, "config.optim.accumulate: got 4; allowed: 1. .* negatives of its small batch .*parts"),
    ("stages.bridges.mixup", -1.0, "config.stages.bridges.mixup: got -1.0; allowed: 0 .off. and up"),
    ("model.shared_dim", 9, "multiple of codebook.dim"),
    ("model.towers.image.trunk", "resnet", "config.model.towers.image.trunk: 'resnet' is not allowed"),
    ("model.towers.image.dropout", 1.0, "config.model.towers.image.dropout: got 1.0"),
    ("stages.bridges.pairs", (("image", "smell"),), "config.stages.bridges.pairs: 'smell' is not allowed"),
    ("stages.bridges.codes", ("depth",), "config.stages.bridges.codes: 'depth' matches none of .'shared', 'image'"),
    ("data.templates", ("a drawing",), "config.data.templates: got 'a drawing'; allowed: a text with one {}"),
    ("data.eval_templates", ("{} {}",), "config.data.eval_templates: got '{} {}'; allowed: a text with one {}"),
    ("stages.bridges.train", ("image/(",), r"stages.bridges.train: got 'image/\('; allowed: a regular expression"),
    ("stage_order", (), "config.stage_order: is empty; allowed: some of .'bridges'"),
    ("stage_order", ("first",), "config.stage_order: 'first' is not allowed; allowed: .'bridges'"),
  ],
)
def test_bad_values_are_named_before_anything_is_built(data, tmp_path, key, value, message):
  with pytest.raises(ValueError, match=message):
    train_and_evaluate(tiny_config(*data, **{key: value}), tmp_path / "never")
  assert not (tmp_path / "never").exists()


def test_a_whitened_start_needs_a_linear_head(data, tmp_path):
  config = tiny_config(*data, **{"model.towers.text.whiten": 0.2, "model.towers.text.hidden": 8})
  with pytest.raises(ValueError, match="text.whiten: got 0.2 with hidden 8; allowed: 0, or hidden 0"):
    train_and_evaluate(config, tmp_path / "never")


def test_a_run_starts_from_whitened_heads_and_its_baseline_from_the_same_without_codebooks(data, tmp_path):
  runs = {}
  for whiten in (0.0, 0.3):
    config = tiny_config(*data, steps=2, baseline=bool(whiten), test=False, **{
      "model.towers.text.whiten": whiten, "stages.bridges.train": ("image/.*",), "model.towers.image.dropout": 0.1,
    })  # fmt: skip
    final = train_and_evaluate(config, tmp_path / str(whiten))
    runs[whiten] = arrays_of(tmp_path / str(whiten))
  path = "params/text/shared/norm/bias"
  assert (runs[0.0][path] == 0).all() and (runs[0.3][path] != 0).any()
  baseline = arrays_of(tmp_path / "0.3" / "baseline")
  np.testing.assert_array_equal(runs[0.3][path], baseline[path])
  assert any(path.startswith("codebooks") for path in runs[0.3])
  assert not any(path.startswith("codebooks") for path in baseline)
  # Same rows, dropout and mixup: before anything has moved (the first rate of the warm-up is 0) the losses are equal.
  own, plain = (lines_of(folder) for folder in (tmp_path / "0.3", tmp_path / "0.3" / "baseline"))
  assert config.stages.bridges.mixup and own[0]["train/info_nce_plain"] != own[1]["train/info_nce_plain"]
  for step in (0, 1):
    np.testing.assert_allclose(plain[step]["train/info_nce"], own[step]["train/info_nce_plain"], rtol=1e-5)
  assert {name for name in plain[0] if name.startswith("train/")} == {
    "train/info_nce", "train/total", "train/gradient_norm"
  }
  configs = [files.read_sealed(tmp_path / "0.3" / name) for name in ("config.json", "baseline/config.json")]
  changed = {line.split(":")[0] for line in schema.difference(*configs)}
  kept = {"commitment", "code_contrast", "code_matching", "decomposition", "specific_uniform"}
  losses = {f"stages.bridges.losses.{name}" for name in (*kept, "info_nce", "info_nce_plain")}
  assert changed == {"baseline", "model.quantize", *losses}
  # `config.test` off: neither of them reads the test set.
  assert "eval/squares_val/zeroshot/image/top1" in final and "baseline/eval/squares_val/zeroshot/image/top1" in final
  assert not any("squares_test" in name for name in final)
  assert not any("squares_test" in name for line in (*own, *plain) for name in line)


def test_a_collapse_is_in_the_log(data, tmp_path, caplog):
  train_and_evaluate(tiny_config(*data, steps=1, **{"codebook.alarm_share": 1.0}), tmp_path)
  assert "step 1: codebook 'shared' collapses: perplexity" in caplog.text
  assert "codebook 'image' collapses" in caplog.text
  caplog.clear()
  warn_of_collapse(codebind_jax.load(tmp_path).codebooks, 0.01, 1)
  assert "collapses" not in caplog.text


def test_balanced_run_weighs_the_terms_and_resumes_bit_for_bit(data, tmp_path):
  config = tiny_config(*data, **{"stages.bridges.balance": True})
  train_and_evaluate(config, tmp_path / "whole")
  lines = [line for line in lines_of(tmp_path / "whole") if "train/total" in line]
  names = [name.removeprefix("train/weight/") for name in lines[0] if name.startswith("train/weight/")]
  assert {"info_nce", "commitment", "decomposition"} <= set(names)
  for line in lines:
    assert line["train/weight/info_nce"] == 1.0
    parts = [line[f"train/weight/{name}"] * line[f"train/{name}"] for name in names]
    np.testing.assert_allclose(line["train/total"], sum(parts), rtol=1e-5)
  first = lines[0]
  np.testing.assert_allclose(
    first["train/weight/decomposition"] * first["train/decomposition"], 0.1 * first["train/info_nce"], rtol=1e-4
  )

  # As after a kill between the checkpoints of step 4 and step 6.
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
  train_and_evaluate(config, tmp_path / "cut")
  assert_same_run(tmp_path / "whole", tmp_path / "cut")
  assert_same_balance(tmp_path / "whole", tmp_path / "cut")


def assert_same_balance(a, b):
  def read(workdir):
    store = Checkpoints(workdir)
    try:
      return param_paths(store.read_arrays(("aux",)))
    finally:
      store.close()

  first, second = read(a), read(b)
  assert int(first["aux/balance/count"]) == 6
  for path in first:
    np.testing.assert_array_equal(first[path], second[path], err_msg=path)


def test_a_balancer_needs_the_loss_it_holds_the_others_to(data):
  config = tiny_config(*data, **{"stages.bridges.balance": True, "stages.bridges.losses.info_nce": 0.0})
  with pytest.raises(ValueError, match="stages.bridges.balance: got True without the loss 'info_nce'"):
    validation.validate(config)


def test_unknown_loss_is_named(data):
  config = tiny_config(*data).unlock()
  config.stages.bridges.losses.info_ncee = 1.0
  with pytest.raises(ValueError, match=r"stages.bridges.losses: 'info_ncee' is not allowed; allowed: \['info_nce'"):
    validation.validate(config)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.stepz=3", "unknown key 'stepz'; allowed: ['baseline', 'batch_size'"),
    ("--config.codebook.dimm=3", "unknown key 'dimm'; allowed: ['codebook.alarm_share'"),
    ("--config.steps=many", "--config.steps=many"),
    ("--config=configs/stage9.py", "--config=configs/stage9.py: there is no such file"),
  ],
)
def test_command_line_names_unknown_keys_and_bad_values(argument, message, tmp_path):
  command = [sys.executable, "-m", "codebind_jax.main", "--config=configs/stage1.py", f"--workdir={tmp_path / 'w'}"]
  done = subprocess.run([*command, argument], cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode != 0 and message in done.stderr, done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "w").exists()


def test_unwritable_workdir(data, tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError, match="file"):
    train_and_evaluate(tiny_config(*data), tmp_path / "file" / "run")


def test_steps_follow_the_top_level_and_stages_add_up(data):
  config = tiny_config(*data).unlock()
  config.stages.more = config.stages.bridges.copy_and_resolve_references()
  config.stage_order = ("bridges", "more")
  config.steps = 9
  first, second = config_lib.read(config).ordered
  assert (first.steps, first.last_step, second.first_step, second.last_step) == (9, 9, 9, 15)
  assert first.modalities == ("image", "text")
  assert dataclasses.replace(first, steps=1).last_step == 1


def test_import_is_light():
  code = "import codebind_jax, sys; print([m for m in ('torch', 'tensorflow', 'jax') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_training_imports_neither_torch_nor_tensorflow():
  code = "import codebind_jax.train, sys; print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert done.stdout.strip().endswith("[]")


def test_jax_runs_on_cpu_in_tests():
  assert jax.default_backend() == "cpu"
