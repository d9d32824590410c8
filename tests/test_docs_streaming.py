"""docs/streaming.md names the formats, kinds and keys that there are."""

import importlib
import pathlib
import pkgutil
import re

from codebind_jax import config as config_lib
from codebind_jax import schema
from codebind_jax.data import augment, formats
from codebind_jax.data.task import Data
from codebind_jax.models.towers import TowerSpec
from configs import stage1

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "streaming.md").read_text(encoding="utf-8")


def table(title):
  """First column -> second column of the table after a heading."""
  rows = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
  return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", rows, re.MULTILINE))


def test_every_ending_is_in_the_table():
  modules = [importlib.import_module(f"{formats.__name__}.{m.name}") for m in pkgutil.iter_modules(formats.__path__)]
  endings = {ending for module in modules for ending in getattr(module, "ENDINGS", ())}
  named = set(re.findall(r"`(\.\w+)`", " ".join(table("What `data.files` takes"))))
  packed = {".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"}  # which are refused by name
  assert named == endings - packed - {".arrayrecord"}


def test_every_kind_of_augmentation_is_in_the_table():
  named = set(re.findall(r"`(\w+)`", " ".join(table("Augmentation").values())))
  modules = [importlib.import_module(f"{augment.__name__}.{name}") for name in augment.augmented()]
  assert named == {kind for module in modules for kind in augment.kinds(module)}


def test_config_lines_are_taken():
  config = stage1.get_config().unlock()
  lines = re.findall(r"^    (config\..*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
  assert len(lines) == 4
  for line in lines:
    exec(line, {"config": config})
  config.model.towers.image.cache, config.model.towers.image.meaning = False, ""
  config.stages.bridges.mixup = 0.0
  read = config_lib.read(config)
  assert read.data.named_files["web"] == ("gs://bucket/web-*.tar",) and read.data.used_worlds == ("icons",)
  assert augment.make("image", read.model.towers["image"].augment).hue == 0.0


def test_keys_named_in_the_text_exist():
  known = set(schema.keys_of(Data)) | {"root"}
  for key in re.findall(r"`(?:--config\.)?data\.(\w+)", PAGE):
    assert key in known, key
  assert {"cache", "views", "augment"} <= set(schema.keys_of(TowerSpec))
