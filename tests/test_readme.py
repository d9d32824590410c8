"""The README's Python runs as it stands, on a tiny run; its commands name files and keys that exist."""

import pathlib
import re

import pytest
from PIL import Image

from codebind_jax import schema
from codebind_jax.embedding.job import embed
from configs import embed as embed_config
from configs import eval as eval_config
from configs import stage1

REPOSITORY = pathlib.Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run(trained, tmp_path, monkeypatch, capsys):
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(trained[2])
  Image.new("RGB", (40, 40), "brown").save(tmp_path / "cow.png")
  monkeypatch.chdir(tmp_path)
  config = embed_config.get_config().unlock()
  config.init_from, config.data.manifest = "runs/quickstart", str(trained[0])
  embed(config.lock(), "runs/embedded")
  capsys.readouterr()
  names: dict = {}
  for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    exec(compile(snippet, "README.md", "exec"), names)
  assert names["ids"].shape == names["scores"].shape == (2, 5) and (tmp_path / "images.parquet").is_file()
  assert names["similarity"].shape == (1, 2) and names["codes"].shape == (1, 16)
  printed = capsys.readouterr().out
  assert any(label in printed for label in ("cow", "violin", "train"))


@pytest.mark.parametrize("config", [stage1.get_config(), eval_config.get_config(), embed_config.get_config()],
                         ids=["stage1", "eval", "embed"])
def test_config_keys_in_commands_exist(config):
  name = "stage1" if config.mode == "train" else config.mode
  commands = [c.replace("\\\n", " ") for c in re.findall(r"python -m codebind_jax.main(?:[^\n]*\\\n)*[^\n]*", README)]
  mine = [c for c in commands if f"configs/{name}.py" in c]
  assert mine
  for command in mine:
    for key in re.findall(r"--config\.([\w.]+)=", command):
      schema.get(config, key)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "launch/README.md"])
def test_scripts_and_files_named_exist(page):
  text = (REPOSITORY / page).read_text(encoding="utf-8")
  paths = re.findall(r"(?:launch|configs|tests)/[\w./]+\.(?:sh|py|sbatch|ipynb|md)", text)
  assert paths
  for path in paths:
    assert (REPOSITORY / path).is_file(), path
