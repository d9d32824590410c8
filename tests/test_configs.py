"""Every shipped config is valid in each of its forms, and says in its head how it is run."""

import importlib
import pathlib
import re

import jax
import pytest

from codebind_jax import config as config_lib
from codebind_jax.data.worlds import registry
from codebind_jax.methods.base import make_init, make_method
from codebind_jax.stages import stages_of
from codebind_jax.train import optimizer_of
from configs import common, progressive, stage1, stage3, synthetic, worlds

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
PARTS = ("__init__", "common", "compare_worlds", "worlds")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)
FORMS = {"stage1": ("", "runlocal"), "progressive": ("", "runlocal", "full", "menagerie,evoked"),
         "synthetic": ("", "runlocal"),
         "compare": ("", "runlocal", "ablations", "real,runlocal", "real,ablations", "generalise,full"),
         **{f"stage{n}": ("", "runlocal", "full") for n in (2, 3, 4, 5)}}


@pytest.mark.parametrize("name, form", [(name, form) for name in NAMES for form in FORMS.get(name, ("",))])
def test_config_is_valid_and_locked(name, form):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config(form) if form else module.get_config()
  assert config.is_locked and f"configs/{name}.py" in module.__doc__
  if config.mode not in ("eval", "embed"):  # which need a run and a manifest
    config_lib.validate(config)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("eval", "embed")])
def test_unknown_form_is_named(name):
  module = importlib.import_module(f"configs.{name}")
  with pytest.raises(ValueError, match="nonsense"):
    module.get_config("nonsense")


def test_a_stage_of_its_own_has_the_towers_of_those_before_and_its_world_alone():
  alone, whole = stage3.get_config(), progressive.get_config("household,materials")
  assert alone.stage_order == ("materials",) and alone.data.worlds == ("materials",)
  assert set(alone.model.towers) == set(whole.model.towers) == {
    "text", "image", "depth", "points", "thermal", "tactile"
  }
  assert alone.stages.materials.to_dict() == whole.stages.materials.to_dict()


def test_a_stage_s_own_numbers_leave_the_other_stages_alone():
  config = progressive.get_config()
  assert config.batch_size == 256 and config.stages.bridges.sources.to_dict() == {"icons": 256}
  assert config.stages.household.sources.to_dict() == {"household": 128}
  config = common.get_config()
  entry = common.stage(config, steps=7, batch_size=9)
  assert (entry.steps, entry.batch_size) == (7, 9) and (config.steps, config.batch_size) == (500, 256)


@pytest.mark.parametrize("world", sorted(registry.WORLDS))
def test_rule_7_no_set_is_of_training_rows_and_none_to_choose_by_is_of_rows_to_be_tested_on(world):
  module = registry.world_module(world)
  for profile in module.PROFILES:
    splits = {role: {s.split for s in module.eval_sets(profile).values() if s.role == role} for role in ("val", "test")}
    assert splits["val"] and not splits["val"] & splits["test"] and "train" not in splits["val"] | splits["test"]
    assert {s.role for s in module.eval_sets(profile).values()} <= set(splits)


def test_video_is_bound_where_the_data_has_it():
  full, small = (progressive.get_config(form) for form in ("full,menagerie", "menagerie"))
  assert ("video", "text") in full.stages.menagerie.pairs and "video" not in small.model.towers
  assert full.model.towers.video.starts_from == "image" and full.emergent == (("audio", "video"),)
  assert worlds.parse("full,evoked") == ("full", ["evoked"])


def test_later_stages_move_nothing_of_the_modalities_before_them():
  stages = stages_of(progressive.get_config("full"))
  before = {"text", "image"}
  for stage in stages[1:]:
    new = set(stage.modalities) - before
    trains = lambda path, stage=stage: any(re.fullmatch(pattern, path) for pattern in stage.train)
    assert set(stage.codes) == new and not any(trains(f"{m}/shared/proj/kernel") for m in before), stage.name
    before |= new


@pytest.mark.parametrize("get_config", [stage1.get_config, synthetic.get_config, progressive.get_config])
def test_weight_decay_is_for_kernels_alone(get_config):
  config = get_config()
  shapes = {name: (1, 384 + tower.meaning_dim) for name, tower in config.model.towers.items()}
  init = make_init(make_method(config), shapes)
  params = jax.eval_shape(lambda rng: init(rng)[0], jax.random.key(0))
  for stage in stages_of(config):
    _, table = optimizer_of(config, stage, params)
    trained = {path: kind for path, kind in table.items() if kind != "frozen"}
    decayed = {path for path, kind in trained.items() if not kind.endswith("wd*0")}
    assert decayed == {path for path in trained if path.endswith("kernel")}, stage.name
    if stage.name == "bridges" and get_config is not synthetic.get_config:  # words never trained on keep their place
      assert {kind.split()[0] for path, kind in trained.items() if path.startswith("text/")} == {"lr*0.1"}
