"""launch/colab.ipynb as a user runs it, but for installing, on tiny data and a tiny config."""

import pathlib
import re

import nbclient
import nbformat
import pytest
from PIL import Image

from codebind_jax import schema
from configs import stage1
from tests.train_fixtures import COLOURS, write_manifest

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture
def notebook():
  return nbformat.read(REPOSITORY / "launch" / "colab.ipynb", as_version=4)


def tagged(notebook, tag):
  (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
  return cell


def test_a_user_gets_the_neighbours_of_a_picture(notebook, tmp_path):
  manifest = write_manifest(tmp_path / "squares")
  Image.new("RGB", (40, 40), "brown").save(tmp_path / "mine.png")
  tagged(notebook, "install").source = f"import subprocess, sys\n%cd {REPOSITORY}\nsys.path.insert(0, '')"
  tagged(notebook, "parameters").source += f"""
config, overrides = "tests/tiny.py:{manifest},{tmp_path / 'root'}", ["--config.steps=2"]
workdir, image, words, shown = {str(tmp_path / 'run')!r}, {str(tmp_path / 'mine.png')!r}, {list(COLOURS)!r}, 10"""
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
  cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
  printed = "".join(output.get("text", "") for output in cells["words"].outputs)
  assert sorted(re.findall(r"^[+-]\d\.\d{3}  (\w+)$", printed, re.MULTILINE)) == sorted(COLOURS)
  assert "codes of the picture: [" in printed
  assert any("image/png" in output.get("data", {}) for output in cells["neighbours"].outputs)
  assert (tmp_path / "run" / "report.html").exists()


def test_a_training_that_fails_stops_the_notebook(notebook, tmp_path):
  last = [cell.id for cell in notebook.cells].index("train")
  notebook.cells = [cell for cell in notebook.cells[: last + 1] if "install" not in cell.metadata.get("tags", ())]
  tagged(notebook, "parameters").source = f"""import subprocess, sys
%cd {REPOSITORY}
config, overrides, workdir = "configs/stage1.py:runlocal", ["--config.stepz=1"], {str(tmp_path / 'run')!r}"""
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="training ended with exit code 1"):
    nbclient.NotebookClient(notebook, timeout=300).execute()


def test_it_is_shipped_without_outputs_and_its_keys_exist(notebook):
  names: dict = {}
  exec(tagged(notebook, "parameters").source, names)
  assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
  assert (REPOSITORY / names["config"].partition(":")[0]).is_file()
  for override in names["overrides"]:
    schema.get(stage1.get_config("runlocal"), override.removeprefix("--config.").partition("=")[0])
