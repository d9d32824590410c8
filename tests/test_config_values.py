"""Values of a whole config that cannot be are refused in `validate`, by the key's name, before anything is opened."""

import math

import pytest

from codebind_jax import schema
from codebind_jax.config import validation
from codebind_jax.data import task
from configs import compare, embed, stage1

STAGE, IMAGE, TEXT = "stages.bridges", "model.towers.image", "model.towers.text"
BAD = (
  ("data.templates", ("no braces",)), ("data.templates", ("{} and {}",)), ("data.templates", ("{name}",)),
  ("data.templates", ("{",)), ("data.templates", ()), ("data.eval_templates", ()), ("data.eval_templates", ("",)),
  ("data.templates_of", {"icons": ()}), ("data.templates_of", {"atlantis": ("{}",)}),
  ("data.worlds", ("icons", "icons")),
  ("data.options", {"colums": {}}), ("data.options", {"separator": 3}), ("data.options", {"encoding": "utf-88"}),
  ("data.workers", 10**6), ("data.threads", 10**6), ("data.holdout", math.nan), ("data.files", ("",)),
  ("data.named_files", {"icons": ("a.jsonl",)}), ("data.named_files", {"a/b": ("a.jsonl",)}),
  ("data.named_files", {"mine": ()}), ("data.root", "a\0b"),
  ("optim.weight_decay", math.nan), ("optim.weight_decay", -1.0), ("optim.warmup", -1), ("optim.warmup", 10**6),
  ("optim.b1", 1.0), ("optim.b2", 0.999999999), ("optim.learning_rate", math.inf), ("optim.rules", (("(", 1.0, 0.0),)),
  ("optim.rules", ((".*", math.nan, 0.0),)), ("optim.accumulate", 0), ("optim.clip_norm", math.nan),
  ("stage_order", ()), ("stage_order", ("bridges", "bridges")), ("stage_order", ("other",)),
  (f"{STAGE}.temperature", math.inf), (f"{STAGE}.temperature", 1e-40), (f"{STAGE}.learning_rate", math.nan),
  (f"{STAGE}.mixup", math.nan), (f"{STAGE}.train", ("[",)), (f"{STAGE}.train", ()), (f"{STAGE}.train", ("imgae/.*",)),
  (f"{STAGE}.train", ("image",)), (f"{STAGE}.codes", ("smell",)), (f"{STAGE}.losses", {"info_nce": math.nan}),
  (f"{STAGE}.losses", {"info_nce": -1.0}), (f"{STAGE}.losses", {"info": 1.0}), (f"{STAGE}.pairs", ()),
  (f"{STAGE}.pairs", (("image", "image"),)), (f"{STAGE}.pairs", (("image", "text"), ("image", "text"))),
  (f"{STAGE}.parts", 7), (f"{STAGE}.sources", {"icons": 2**31}), (f"{STAGE}.batch_size", 2**31),
  (f"{STAGE}.steps", 10**12), (f"{STAGE}.tune", {"smell": "full"}),
  ("codebook.decay", 1.0), ("codebook.decay", 0.99999999999), ("codebook.codes", {"image": 0}),
  ("codebook.codes", {"image": 10**9}), ("codebook.shared_codes", 10**9), ("codebook.dim", 10**9),
  ("codebook.stages", 0), ("codebook.positions", "all"), ("codebook.rotation", "random"), ("codebook.start", "opq"),
  ("codebook.start_rows", 0), ("codebook.gradient", "none"), ("queries", "plain"),
  (f"{IMAGE}.hidden", -1), (f"{IMAGE}.hidden", 10**9), (f"{IMAGE}.logit_scale", -1.0), (f"{IMAGE}.specific_dim", 10**9),
  (f"{IMAGE}.options.size", (0,)), (f"{IMAGE}.options.fit", "squeeze"), (f"{IMAGE}.options.levels", (8,)),
  (f"{IMAGE}.options.class_names", "nobody"), (f"{IMAGE}.options.weights", "/nowhere/weights.pth"),
  (f"{IMAGE}.augment", {"kind": "fog"}), (f"{TEXT}.options.max_length", 2), (f"{TEXT}.options.heads", 0),
  ("mesh.data", 0), ("mesh.fsdp", -1), ("mesh.tensor", -2), ("sharding.codes", "rows"),
  ("seed", -1), ("seed", 2**32), ("seed", 1.5), ("steps", True), ("steps", "5"), ("steps", 2**31),
  ("keep_checkpoints", 0),
  ("batch_size", 0), ("checkpoint_steps", 0), ("log_steps", 0), ("eval_steps", 0), ("tasks", ("codes", "codes")),
  ("emergent", (("image", "image"),)), ("method", ""), ("method", "no/method"), ("topology", "v5e"),
  ("init_from", "a\nb"),
)  # fmt: skip


def changed(config, path, value):
  """The plain config with another value at a dotted path."""
  plain = schema.to_plain(config)
  part = plain
  *parents, last = path.split(".")
  for parent in parents:
    part = part[parent]
  part[last] = value
  return plain


@pytest.fixture(autouse=True)
def nothing_is_opened(monkeypatch):
  def never(*_, **__):
    raise AssertionError("data was opened")

  monkeypatch.setattr(task, "open_source", never)
  monkeypatch.setattr("codebind_jax.data.worlds.fetch.fetch_all", never)


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{path}={value!r}"[:60] for path, value in BAD])
def test_a_bad_value_is_refused_by_its_name(path, value):
  with pytest.raises(ValueError) as error:
    validation.validate(changed(stage1.get_config(), path, value))
  named = {"mesh.fsdp": "mesh"}.get(path, path)
  if value == (0,) or "options." in path or isinstance(value, dict):  # by the option, or the entry
    named = path.rpartition(".")[0] if "options." in path else path
  assert f"config.{named}" in str(error.value)
  assert any(words in str(error.value) for words in ("allowed", "must be", "matches none of"))


@pytest.mark.parametrize(("path", "value"), [
  ("compare.variants", {}), ("compare.only", "nobody"), ("compare.only", "codebind,codebind"), ("compare.seeds", 0),
  ("compare.learning_rates", ()), ("compare.learning_rates", (math.nan,)), ("compare.timing", -1),
  ("compare.against", "/nowhere.json"), ("compare.fields", ()), ("compare.world.quality", {"audio": 1.5}),
  ("compare.world.quality", {"smell": 0.5}), ("compare.world.noise", math.inf), ("compare.world.seed", 2**32),
  ("compare.variants.dcid.options.decay", 1.0), ("compare.variants.dcid.options.club_rate", math.nan),
  ("compare.variants.codebind.losses", {"info_nce": math.inf}), ("compare.variants.dcid.method", "dcidd"),
])  # fmt: skip
def test_a_bad_value_of_a_comparison_is_refused_by_its_name(path, value):
  with pytest.raises(ValueError, match=f"config.{path}"):
    validation.validate(changed(compare.get_config(), path, value))


@pytest.mark.parametrize(("path", "value"), [
  ("embed.shard_rows", 0), ("embed.batch_size", 10**9), ("embed.threads", 0), ("embed.parts", ()),
  ("embed.parts", ("codes", "codes")), ("embed.modalities", ("a/b",)), ("embed.dtype", "float64"),
])  # fmt: skip
def test_a_bad_value_of_embedding_is_refused_by_its_name(path, value):
  config = changed(changed(embed.get_config(), "init_from", "run"), "data.files", "a.jsonl")
  validation.validate(config)
  with pytest.raises(ValueError, match=f"config.{path}"):
    validation.validate(changed(config, path, value))


def test_several_faults_are_told_at_once():
  config = changed(changed(stage1.get_config(), "steps", 0), "optim.b1", 1.0)
  with pytest.raises(ValueError, match=r"config.steps: got 0(.|\n)*config.optim.b1: got 1.0; allowed: any number"):
    validation.validate(config)


def test_what_cannot_fit_into_memory_is_told_by_its_key(monkeypatch):
  config = changed(stage1.get_config(), "codebook.shared_codes", 1 << 24)
  monkeypatch.setattr(validation, "_memory", lambda: 1e12)
  validation.validate(config)
  monkeypatch.setattr(validation, "_memory", lambda: 1e8)
  with pytest.raises(ValueError, match=r"config.codebook.shared_codes: got 16,777,216, whose .* 0 GB"):
    validation.validate(config)


def test_a_run_is_not_written_into_what_it_reads(tmp_path):
  started = validation.validate(changed(stage1.get_config(), "init_from", str(tmp_path / "run")))
  validation.check_folder(started, tmp_path / "other")
  with pytest.raises(ValueError, match="config.init_from: got .*, which is the workdir"):
    validation.check_folder(started, f"{tmp_path}/run/")
  (tmp_path / "data").mkdir()
  files = validation.validate(changed(stage1.get_config(), "data.files", str(tmp_path / "data")))
  validation.check_folder(files, tmp_path / "out")
  with pytest.raises(ValueError, match="config.data.files: got .*, in which the workdir"):
    validation.check_folder(files, tmp_path / "data" / "out")
