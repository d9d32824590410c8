"""The quick form of every shipped config starts: two steps of it, shrunk, on drawn worlds of the same modalities."""

import pathlib
import re

import numpy as np
import pytest

from codebind_jax import load
from codebind_jax.api import config_of
from codebind_jax.compare.run import compare
from codebind_jax.embedding.job import embed
from codebind_jax.evaluate import evaluate
from codebind_jax.train import train_and_evaluate
from configs import common, progressive, stage1, stage2, stage3, stage4, stage5, synthetic
from configs import compare as compare_config
from configs import embed as embed_config
from configs import eval as eval_config
from tests.train_fixtures import lines_of

WORLDS = {
  "icons": "synthetic-image-text", "household": "synthetic-image-depth-thermal-points-text",
  "materials": "synthetic-image-tactile-text", "menagerie": "synthetic-audio-text", "evoked": "synthetic-eeg-text",
}  # fmt: skip
ROWS = 8


def drawn(name):
  """The drawn world in a packaged one's place; "menagerie_val_notes" has its set of the same role."""
  world, _, of_set = name.partition("_")
  return "_".join((WORLDS.get(world, world), *of_set.split("_")[:1])) if of_set else WORLDS.get(world, world)


def shrunk(config, folder):
  """Two steps a stage on few rows of narrow towers. Stages, pairs and methods stay; of the losses the first, since the
  others only take long to compile: their names are checked in test_configs.py, their values in test_step_terms.py."""
  config = config.unlock()
  config.update_from_flattened_dict({
    "steps": 2, "batch_size": ROWS, "log_steps": 1, "eval_steps": 1000, "checkpoint_steps": 1000, "baseline": False,
    "tasks": ("zeroshot", "retrieval"), "model.shared_dim": 16, "model.decoder": {"width": 8, "depth": 1, "heads": 1},
    "codebook.shared_codes": 16, "data.profile": "tiny", "data.root": str(folder / "data"),
  })  # fmt: skip
  for modality, tower in config.model.towers.items():
    trunk = "hashed_words" if modality == "text" else "vectors"
    options = {"width": 16} if modality == "text" else {"width": 64, "modality": modality}
    kept = {key: tower[key] for key in ("whiten", "starts_from")}
    config.model.towers[modality] = common.tower(trunk, options=options, specific_dim=16 * (modality != "text"), **kept)
  for modality in config.codebook.codes:
    config.codebook.codes[modality] = 8
  config.data.worlds = tuple(map(drawn, config.data.worlds))
  config.data.templates_of = {drawn(name): templates for name, templates in config.data.templates_of.items()}
  for stage in config.stages.values():
    stage.steps, stage.losses = 2, dict(list(stage.losses.items())[:1])
    stage.sources = {drawn(name): ROWS for name in stage.sources}
  return config.lock()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Trains the quick form of a stage's config from the run of the stage before, once: run(1) is the first's folder."""
  folder, stages = tmp_path_factory.mktemp("stages"), (stage1, stage2, stage3, stage4, stage5)

  def run(number):
    workdir = folder / f"stage{number}"
    if not workdir.exists():
      config = shrunk(stages[number - 1].get_config("runlocal"), folder).unlock()
      config.init_from = str(run(number - 1)) if number > 1 else ""
      train_and_evaluate(config.lock(), workdir)
    return workdir

  return run


# CI trains the later stages in the quick form of configs/progressive.py.
@pytest.mark.parametrize("number", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 5))])
def test_a_stage_of_its_own(run, number):
  lines = lines_of(run(number))
  assert [line["step"] for line in lines if "train/total" in line] == [1, 2]
  assert any("/zeroshot/" in name for name in lines[-1])


def test_a_small_index_starts_from_a_continuous_lineage(tmp_path, caplog):
  whole = shrunk(progressive.get_config("evoked,runlocal"), tmp_path).unlock()
  whole.model.quantize = False
  for stage in whole.stages.values():
    stage.losses = {"info_nce": 1.0}
  train_and_evaluate(whole.lock(), tmp_path / "whole")
  config = progressive.get_config("12,evoked,runlocal")
  alone = stage1.get_config("12,runlocal").codebook.to_dict()
  assert config.codebook.to_dict() == alone | {"codes": {"image": 16, "eeg": 16}, "dims": {"eeg": 64}}
  assert config.steps == 1 and config.codebook.stages == 9 and config.codebook.shared_codes == 1024
  config.unlock().codebook.dims = {}
  small = shrunk(config, tmp_path).unlock()
  small.codebook.update(common.small_index(small.model, 3))
  small.stages.index.steps, small.init_from = 1, str(tmp_path / "whole")
  caplog.set_level("INFO", "absl")
  final = train_and_evaluate(small.lock(), tmp_path / "small")
  # Items of both worlds, each distinct one once; texts of both.
  (line,) = [record.getMessage() for record in caplog.records if "codebooks start from" in record.getMessage()]
  rows = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", line)}
  assert set(rows) == {"image", "text", "eeg"} and rows["image"] > ROWS and rows["eeg"] > ROWS
  model = load(tmp_path / "small")
  found = model.embed({"text": ["a red square", "a blue one"]})["text"]
  assert found.codes_shared.shape == (2, 2)
  assert {shared for shared, _ in config_of(tmp_path / "small").item_bytes.values()} == {3}
  # The heads are those of the run before: what a query is has hardly moved.
  before = load(tmp_path / "whole").embed({"text": ["a red square", "a blue one"]})["text"]
  np.testing.assert_allclose(found.query, before.shared, atol=1e-4)
  assert any("/zeroshot/" in name for name in final)
  for module in (stage1, progressive):
    with pytest.raises(ValueError, match="'12,24': got 2 numbers of bytes an item; allowed: one"):
      module.get_config("12,24")
  with pytest.raises(ValueError, match="'0' is not allowed; allowed: .*evoked, joint, a number of bytes an item"):
    progressive.get_config("0")


@pytest.mark.parametrize(("module", "name"), [(stage1, "stage1"), (progressive, "progressive")])
def test_a_small_index_makes_no_codes_of_heads_that_were_never_trained(module, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("codebind_jax.train.open_task", None)  # it ends before a world is fetched
  config = module.get_config("12,runlocal")
  assert config.init_from == f"runs/{name}/baseline"
  with pytest.raises(ValueError, match=f"config.init_from: .*runs/{name}/baseline"):
    train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow  # CI trains the quick form of configs/progressive.py itself; test_synthetic.py has the other
@pytest.mark.parametrize(
  ("module", "form"), [(progressive, "runlocal,joint"), (synthetic, "runlocal")], ids=["progressive", "synthetic"]
)
def test_stages_in_one_run(module, form, tmp_path):
  final = train_and_evaluate(shrunk(module.get_config(form), tmp_path), tmp_path / "run")
  lines = lines_of(tmp_path / "run")
  trained = [line["stage"] for line in lines if "train/total" in line]
  stages = ["bridges", "household", "materials", "menagerie", "evoked", *["joint"] * ("joint" in form)]
  assert trained == [stage for stage in stages for _ in range(2)]
  assert any(name.startswith("retention/") for name in final)
  assert any("/emergent/audio_to_depth/" in name for name in final)
  assert (tmp_path / "run" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
  ("form", "variant"),
  [("runlocal", "info_nce"), ("equal,runlocal", "centrobind"), ("real,runlocal", "fixed_anchor_text"),
   ("generalise,runlocal", "centrobind"), ("ablations,runlocal", "codebind_no_codes")],
)  # fmt: skip
def test_a_comparison(form, variant, tmp_path):
  """One variant of each; test_compare.py has the tuning of rates, and test_methods.py the methods."""
  config = shrunk(compare_config.get_config(form), tmp_path).unlock()
  config.compare.variants = {variant: config.compare.variants[variant]}
  if config.compare.get("world"):
    config.compare.world.rows = 64
  for transfer in config.compare.get("transfers", {}).values():
    sets = {role: tuple(dict.fromkeys(map(drawn, transfer[role]))) for role in ("val", "test")}
    transfer.update({"worlds": tuple(map(drawn, transfer.worlds))} | sets)
  found = compare(config.lock(), tmp_path / "run")["results"][variant]["runs"]
  assert len(found) == 1 and any(name.startswith("eval/test/") for name in found[0])
  assert (tmp_path / "run" / "comparison.md").stat().st_size > 100


def test_evaluation_and_embedding(trained, tmp_path):
  manifest, root, workdir = trained
  given = {"init_from": str(workdir), "data.manifest": str(manifest)}
  config = eval_config.get_config().unlock()
  config.update_from_flattened_dict(given | {"data.root": str(root)})
  assert "eval/squares_test/zeroshot/image/top1" in evaluate(config.lock(), tmp_path / "eval")
  config = embed_config.get_config().unlock()
  config.update_from_flattened_dict(given)
  assert embed(config.lock(), tmp_path / "embed")["rows"] == 40


def test_every_config_with_a_mode_that_runs_here_is_above():
  """Those on published weights: tests/test_paper.py, tests/test_tune.py; on a user's data: tests/test_bind.py."""
  folder, parts = pathlib.Path(common.__file__).parent, ("__init__", "common", "compare_worlds", "imagebind", "worlds")
  names = {path.stem for path in folder.glob("*.py")} - {*parts, "imagebind_huge", "finetune", "bind"}
  modules = (stage1, stage2, stage3, stage4, stage5, progressive, synthetic, compare_config, eval_config, embed_config)
  assert names == {module.__name__.removeprefix("configs.") for module in modules}
