"""Every shipped config is valid in each of its forms, and says in its head how it is run."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from codebind_jax import command_line, schema
from codebind_jax import config as config_lib
from codebind_jax.config import validation
from codebind_jax.data.worlds import registry
from codebind_jax.methods.base import make_init
from codebind_jax.runtime.optim import param_paths
from codebind_jax.train import optimizer_of
from codebind_jax.trunks import input_shapes, load_trunk
from configs import common, compare, progressive, stage1, stage3, synthetic, worlds

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
PARTS = ("__init__", "common", "compare_worlds", "imagebind", "worlds")
OWN_WEIGHTS = ("finetune", "imagebind_huge")  # whose argument is a path
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in (*PARTS, *OWN_WEIGHTS))
FORMS = {"stage1": ("", "runlocal"), "progressive": ("", "runlocal", "full", "menagerie,evoked", "full,24",
                                                          "joint"),
         "synthetic": ("", "runlocal"),
         "compare": ("", "runlocal", "equal", "ablations", "real,runlocal", "real,ablations", "regularised",
                     "real,regularised", "generalise,full", "bytes", "bytes,runlocal", "bytes,12,24",
                     "bytes,24,ablations", "bytes,lineage", "bytes,8,lineage,evoked,ablations,trained,published",
                     "hard", "hard,runlocal", "unified", "unified,runlocal"),
         **{f"stage{n}": ("", "runlocal", "full") for n in (2, 3, 4, 5)}}


@pytest.mark.parametrize("name, form", [(name, form) for name in NAMES for form in FORMS.get(name, ("",))])
def test_config_is_valid_and_locked(name, form):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config(form) if form else module.get_config()
  assert config.is_locked and f"configs/{name}.py" in module.__doc__
  if config.mode not in ("eval", "embed", "bind"):  # which need a run or data
    validation.validate(config)


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


@pytest.mark.parametrize("module", [progressive, synthetic])
def test_a_stage_s_number_set_by_a_command_leaves_the_others_alone(module):
  numbers = lambda config: {name: (s.steps, s.batch_size, s.sources.to_dict()) for name, s in config.stages.items()}
  plain = module.get_config()
  (world,) = plain.stages.bridges.sources
  ours = {"stages.bridges.steps": 7, "stages.bridges.batch_size": 5, f"stages.bridges.sources.{world}": 9}
  config = changed(module.get_config(), **ours)
  assert (config.steps, config.batch_size) == (plain.steps, plain.batch_size)
  assert numbers(config) == numbers(plain) | {"bridges": (7, 5, {world: 9})}
  follows = changed(module.get_config(), batch_size=11, steps=70).stages.bridges
  assert (follows.steps, follows.batch_size, follows.sources[world]) == (70, 11, 11)


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
  assert worlds.parse(["full", "evoked"]) == ("full", ["evoked"])


def test_later_stages_move_nothing_of_the_modalities_before_them():
  stages = config_lib.read(progressive.get_config("full")).ordered
  before = {"text", "image"}
  for stage in stages[1:]:
    new = set(stage.modalities) - before
    trains = lambda path, stage=stage: any(re.fullmatch(pattern, path) for pattern in stage.train)
    assert set(stage.codes) == new and not any(trains(f"{m}/shared/proj/kernel") for m in before), stage.name
    before |= new


def test_a_joint_stage_binds_all_pairs_on_all_worlds_and_freezes_nothing():
  config = config_lib.read(progressive.get_config("materials,evoked,joint"))
  *before, joint = config.ordered
  assert [stage.name for stage in before] == ["bridges", "materials", "evoked"] and joint.name == "joint"
  assert sorted(joint.pairs) == [("eeg", "text"), ("image", "text"), ("tactile", "image"), ("tactile", "text")]
  assert dict(joint.sources) == {"icons": 256, "materials": 128, "evoked": 128}
  assert (joint.train, joint.codes, joint.steps) == ((".*",), (".*",), 100)
  with pytest.raises(ValueError, match="'joint' goes without a number of bytes"):
    progressive.get_config("24,joint")


def test_codes_may_have_any_width_that_the_towers_are_multiples_of():
  config = stage1.get_config("runlocal").unlock()
  config.codebook.dim = 6
  assert config_lib.method_of(validation.validate(config)).spec.code_dims == (6, 6)


def changed(config, **overrides):
  config = config.unlock()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
  return config


PAPER = sorted(path.stem for path in (FOLDER / "paper").glob("[!_]*.py"))
# Spec section 3: commitment, both codes' terms, matching, decomposition, uniformity; rate of the trunk; batch of 8
# devices; how the trunk trains.
ROWS = {
  "image": (10, 0.01, 0.05, 0.1, 1, None, 320, None),
  "depth": (1000, 0.01, 0.1, 0.1, 1, 5e-4, 80, "lora"),
  "audio": (50, 0.01, 1, 0.1, 1, 5e-5, 48, "lora"),
  "thermal": (100, 0.01, 0.5, 0.5, 1, 5e-5, 80, "lora"),
  "tactile": (1000, 0.01, 0.1, 0.1, 1, 5e-4, 80, "full"),
  "eeg": (10, 0.01, 0.1, 0.05, 0.1, 5e-4, 64, "lora"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_publication_s_settings(name):
  module = importlib.import_module(f"configs.paper.{name}")
  config = validation.validate(changed(module.get_config(), mode="compile"))
  assert f"configs/paper/{name}.py" in module.__doc__ and set(ROWS) == set(PAPER)
  (stage,), (vq, reg, matching, decomposition, uniform, rate, batch, tune) = config.ordered, ROWS[name]
  losses = stage.losses
  assert (losses["commitment"], losses["code_contrast"]) == (vq, reg) and "code_uniform" not in losses
  assert (losses["code_matching"], losses["decomposition"], losses["specific_uniform"]) == (
    matching, decomposition, uniform)  # fmt: skip
  assert losses["info_nce"] == losses["reconstruction"] == 1 and stage.batch_size == batch
  assert stage.temperature == {"audio": 0.05, "thermal": 0.1}.get(name, 0.07)
  optim = config.optim
  assert (optim.b1, optim.b2, optim.weight_decay, optim.clip_norm, optim.final_ratio) == (0.9, 0.95, 1e-4, 1.0, 1 / 50)
  assert all(tower.logit_scale == 1 for tower in config.model.towers.values())
  trunks = {m: load_trunk(tower.trunk, **tower.options) for m, tower in config.model.towers.items()}
  init = make_init(config_lib.method_of(config), input_shapes(config.model, trunks), config.model.half, [stage])
  params = jax.eval_shape(lambda rng: init(rng)[0], jax.random.key(0))
  _, table = optimizer_of(config, config_lib.method_of(config), stage, params)
  rates = {path: float(kind.split()[0].split("*")[1]) * optim.learning_rate
           for path, kind in table.items() if kind != "frozen"}  # fmt: skip
  assert not any(re.match(r"(text|image)/trunk/", path) for path in rates)
  assert {round(r, 9) for path, r in rates.items() if "/specific/" in path} == {5e-4}
  if name == "image":
    assert {round(r, 9) for path, r in rates.items() if "/shared/" in path} == {1e-5}
    return
  trunk = {path: r for path, r in rates.items() if path.startswith(f"{name}/trunk/")}
  assert {round(r, 9) for r in trunk.values()} == {rate}
  if tune == "lora":
    assert all(re.search(r"(lora_[ab]|cls_token)$", path) for path in trunk)
    assert {leaf.shape[-1] for path, leaf in param_paths(params).items() if path.endswith("lora_a")} == {4}
  else:
    assert any(path.endswith("mlp/fc1/kernel") for path in trunk)
  halves = {path for path, leaf in param_paths(params).items() if leaf.dtype == jnp.bfloat16}
  assert halves and not halves & set(rates)


def test_a_mode_that_lacks_its_section_is_named():
  config = compare.get_config("runlocal").unlock()
  del config["compare"]
  with pytest.raises(ValueError, match="config.compare: must be set for mode 'compare'"):
    validation.validate(config)


FILE = str(FOLDER / "stage1.py:runlocal")


def test_options_of_trunks_and_methods_are_keys_of_the_command_line():
  config = command_line.read_file(FILE)
  assert schema.get(config, "model.towers.image.options.weights") == ""
  assert config.model.towers.image.options.size == (160, 224) and config.model.towers.text.options.layers == 6
  assert command_line.read_file(str(FOLDER / "embed.py")).is_locked


def test_a_module_that_the_command_names_brings_its_own_options():
  argv = "main --config=x --config.method dcid --config.model.towers.image.trunk=vectors --config.steps=3"
  chosen = command_line.chosen(argv.split())
  assert chosen == {"method": "dcid", "model.towers.image.trunk": "vectors"}
  config = command_line.read_file(FILE, argv.split())
  assert config.method == "dcid" and config.method_options.codes == 400 and config.method_options.form == "joint"
  assert config.model.towers.image.options.to_dict() == {"width": 64, "tokens": 1, "modality": "vectors", "weights": ""}
  assert config.model.towers.text.options.layers == 6
  # What no module is called is left to `validate`, which says what is allowed.
  with pytest.raises(ValueError, match="config.method: got 'best'; allowed: "):
    validation.validate(command_line.read_file(FILE, ["--config.method=best"]))
  with pytest.raises(ValueError, match="config.model.towers.image.trunk: 'best' is not allowed; allowed: "):
    validation.validate(command_line.read_file(FILE, ["--config.model.towers.image.trunk=best"]))


def test_a_command_adds_names_where_a_section_takes_them():
  """A term that the file does not list, a modality's own width, ...; other keys must be there."""
  argv = ["main", "--config.stages.bridges.losses.reconstruction=1.0", "--config.codebook.dims.image", "4",
          "--config.data.templates_of.icons=('an icon of {}',)", "--config.stages.bridges.losses.commitment=3.0",
          "--config.stages.bridges.tune.image=lora", "--config.stages.none.losses.commitment=1.0",
          "--config.codebook.dimms.image=4", "--config.model.towers.image.options.no=1", "--nosuch"]  # fmt: skip
  plain = command_line.read_file(FILE)
  config = command_line.read_file(FILE, argv)
  added = {"stages.bridges.losses.reconstruction": 0.0, "codebook.dims.image": 0, "stages.bridges.tune.image": "",
           "data.templates_of.icons": ()}  # fmt: skip
  for path, value in added.items():
    assert schema.get(config, path) == value and type(schema.get(config, path)) is type(value), path
  changes = schema.difference(schema.to_plain(plain), schema.to_plain(config))
  assert [line.split(": ")[0] for line in changes] == sorted(added)  # of the others there is no such section
  config = command_line.read_file(FILE, ["--config.stages.bridges.losses.nothing=1.0"])
  with pytest.raises(ValueError, match="config.stages.bridges.losses: 'nothing' is not allowed; allowed: .*'info_nce'"):
    validation.validate(config)


def test_a_method_that_the_command_names_takes_none_of_the_stages_keys_that_it_does_not_heed():
  argv = ["main", "--config.method=centrobind"]
  config = command_line.read_file(FILE, argv)
  assert not config.stages.bridges.losses and config.stages.bridges.code_rows == 0 and config.stages.bridges.mixup == 1
  assert validation.validate(config).method == "centrobind"
  with config.unlocked():
    config.stages.bridges.code_rows = 4  # as the command may set it afterwards
  with pytest.raises(ValueError, match="stages.bridges.code_rows: got 4, which method 'centrobind' does not heed"):
    validation.validate(config)


def test_options_given_in_a_file_stay_beside_the_defaults():
  config = command_line.read_file(str(FOLDER / "compare.py:runlocal"))
  assert config.compare.variants.dcid.options.codes == 64 and config.compare.variants.dcid.options.beta == 0.25
  read, file = config_lib.read(config), config_lib.read(compare.get_config("runlocal"))
  assert read == file  # which gives the defaults when it is read


ABOVE_0 = ("steps", "batch_size", "log_steps", "eval_steps", "checkpoint_steps", "keep_checkpoints", "model.shared_dim",
           "model.decoder.width", "model.decoder.depth", "codebook.dim", "codebook.shared_codes",
           "codebook.codes.image", "optim.learning_rate", "optim.clip_norm", "stages.bridges.steps",
           "stages.bridges.batch_size",
           "stages.bridges.temperature", "stages.bridges.sources.icons", "stages.bridges.weights.icons",
           "embed.shard_rows", "embed.batch_size", "embed.threads")  # fmt: skip
RANGES = [
  *((path, 0, "any number above 0") for path in ABOVE_0),
  *((path, -1, "0 and up") for path in ("data.max_bad_records", "seed", "optim.warmup")),
  *((path, 1.5, "0 to 1") for path in ("codebook.decay", "codebook.alarm_share", "optim.b1", "optim.b2",
                                       "model.towers.image.augmented")),
  ("model.towers.image.views", 0, "1 and up"), ("model.towers.image.dropout", 1, "0 up to, not including, 1"),
  ("model.towers.text.whiten", 1.5, "0 (off) to 1"), ("data.extra", 1, "0 (none) up to, not including, 1"),
  ("stages.bridges.learning_rate", -1, "0 (config.optim's) and up"), ("stages.bridges.parts", 0, "1 and up"),
  ("stages.bridges.code_rows", -1, "0 (all) and up"), ("stages.bridges.chunk", -1, "0 (the whole matrix) and up"),
  ("stages.bridges.mixup", -1, "0 (off) and up"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "allowed"), RANGES, ids=[path for path, _, _ in RANGES])
def test_a_number_out_of_its_range_is_refused(path, value, allowed):
  plain = schema.to_plain(stage1.get_config("runlocal"))
  *parents, last = path.split(".")
  part = plain
  for key in parents:
    part = part.setdefault(key, {})
  part[last] = value
  with pytest.raises(ValueError) as error:
    config_lib.read(plain)
  assert str(error.value).replace(".0; ", "; ") == f"config.{path}: got {value}; allowed: {allowed}"


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("data.worlds", ("atlantis",), "config.data.worlds: 'atlantis' is not allowed; allowed: "),
    ("data.worlds", (), "config.data.worlds: is empty; allowed: some of .* or data.files set"),
    ("model.towers.text.starts_from", "smell", "model.towers.text.starts_from: 'smell' is not allowed; allowed: "),
    ("model.towers.image.meaning_dim", 0, "config.model.towers.image.meaning_dim: got 0; allowed: 1 and up"),
    ("model.towers.image.specific_dim", 3, "specific_dim: got 3; allowed: 0 or a multiple of codebook.dim .2."),
    ("model.towers.text.specific_dim", 4, "config.codebook.codes: no entry for 'text', which has a specific part"),
    ("codebook.codes", {"image": 4, "smell": 4}, "config.codebook.codes: 'smell' is not allowed; allowed: "),
    ("model.decoder.heads", 5, "config.model.decoder: got .*'heads': 5.*; allowed: heads that divide the width"),
    ("stages.bridges.sources", {"atlantis": 4}, "config.stages.bridges.sources: 'atlantis' is not allowed; allowed: "),
    ("sharding.codes", "rows", "config.sharding.codes: got 'rows'; allowed: '' .whole. or "),
  ],
)
def test_keys_that_do_not_go_together_are_named(path, value, message):
  config = changed(stage1.get_config("runlocal"), **{path.replace(".", "__"): value})
  with pytest.raises(ValueError, match=message):
    validation.validate(config)


@pytest.mark.parametrize("get_config", [stage1.get_config, synthetic.get_config, progressive.get_config])
def test_weight_decay_is_for_kernels_alone(get_config):
  read = config_lib.read(get_config())
  size = lambda tower: (1, 384 + tower.meaning_dim) if tower.cache else (1, 64)
  shapes = {name: jax.ShapeDtypeStruct(size(tower), jnp.float32) for name, tower in read.model.towers.items()}
  method = config_lib.method_of(read)
  init = make_init(method, shapes)
  params = jax.eval_shape(lambda rng: init(rng)[0], jax.random.key(0))
  for stage in read.ordered:
    _, table = optimizer_of(read, method, stage, params)
    trained = {path: kind for path, kind in table.items() if kind != "frozen"}
    decayed = {path for path, kind in trained.items() if not kind.endswith("wd*0")}
    assert decayed == {path for path in trained if path.endswith("kernel")}, stage.name
    if stage.name == "bridges" and get_config is not synthetic.get_config:  # words never trained on keep their place
      assert {kind.split()[0] for path, kind in trained.items() if path.startswith("text/")} == {"lr*0.1"}
