"""What pip installs is whole, and runs own and shipped configs from any folder."""

import os
import pathlib
import subprocess
import sys

import pytest

from codebind_jax import command_line

REPOSITORY = pathlib.Path(__file__).parents[1]
MINE = """
from configs import common, stage1


def get_config():
  config = stage1.get_config("runlocal").unlock()
  config.model.towers.text = common.tower("hashed_words")
  return config.lock()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """What a wheel holds, in a folder."""
  folder = tmp_path_factory.mktemp("build")
  command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build", "--build-base", folder,
             "--build-lib", folder / "lib"]  # fmt: skip
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder / "lib"


def contents(folder):
  found = (path.relative_to(folder) for room in ("codebind_jax", "configs") for path in (folder / room).rglob("*"))
  return {str(path) for path in found if (folder / path).is_file() and "__pycache__" not in path.parts}


def test_every_file_of_package_and_configs_is_installed(installed):
  assert {path.name for path in installed.iterdir()} == {"codebind_jax", "configs"}
  assert contents(installed) == contents(REPOSITORY)
  assert {"codebind_jax/report/template.html", "configs/paper/depth.py"} <= contents(installed)


def run(installed, folder, *arguments):
  """What the installed command says from another folder; every run ends with an error before any work."""
  command = [sys.executable, "-m", "codebind_jax.main", "--workdir=run", *arguments, "--config.steps=0"]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                        env=os.environ | {"PYTHONPATH": str(installed)})  # fmt: skip
  assert done.returncode == 1
  return done.stderr


@pytest.mark.parametrize("config", ["mine.py", "configs/stage1.py:runlocal", "configs/paper/depth.py:x.pth"])
def test_own_and_shipped_configs_are_found_outside_the_checkout(installed, tmp_path, config):
  (tmp_path / "mine.py").write_text(MINE)
  assert "error: config.steps: got 0; allowed: any number above 0" in run(installed, tmp_path, f"--config={config}")


def test_a_path_that_exists_wins_over_the_shipped_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert pathlib.Path(command_line.find_file("configs/stage1.py")) == REPOSITORY / "configs" / "stage1.py"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "stage1.py").write_text(MINE)
  assert command_line.find_file("configs/stage1.py") == "configs/stage1.py"
  for missing in ("configs/stage9.py", "stage1.py", "other/configs/stage1.py"):
    with pytest.raises(ValueError, match=r"there is no such file; this package's own are configs/NAME.py, NAME one of"):
      command_line.find_file(missing)
