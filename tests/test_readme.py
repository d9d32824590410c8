"""README and docs: Python runs as it stands, on tiny models; commands, files, keys and links are there."""

import importlib.util
import pathlib
import re

import pytest
from PIL import Image

import codebind_jax.api
from codebind_jax import command_line, schema
from codebind_jax.embedding.job import embed
from codebind_jax.methods.codebind_terms import TERMS
from codebind_jax.tools import sweep
from configs import embed as embed_config
from tests import family_fixtures

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in (
  REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "launch" / "README.md",
  REPOSITORY / "benchmarks" / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")),
)}  # fmt: skip
OWN_TESTS, EXAMPLE = ("docs/add_a_modality.md",), "configs/motion.py"  # tests/test_tenth_modality.py writes its files
PYTHON = re.compile(r"```python\n(.*?)```(?:[^`]*```text\n(.*?)```)?", re.DOTALL)
COMMAND = re.compile(r"python -m (codebind_jax[\w.]*|benchmarks[\w.]*)((?:[^\n]*\\\n)*[^\n`]*)")


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
  """A folder as the pages' Python finds it: a run, its embeddings, and pictures."""
  folder = tmp_path_factory.mktemp("pages")
  (folder / "runs").mkdir()
  (folder / "runs" / "quickstart").symlink_to(trained[2])
  for name in ("cow.png", "dog.png"):
    Image.new("RGB", (40, 40), "brown").save(folder / name)
  family_fixtures.unpack("clip_hf", folder / "clip")
  config = embed_config.get_config().unlock()
  config.init_from, config.data.manifest = str(folder / "runs" / "quickstart"), str(trained[0])
  embed(config.lock(), folder / "runs" / "embedded")
  return folder


def shape_of(text):
  """Printed lines with N for every number, in any order."""
  numbers = re.sub(r"-?\d+(\.\d*)?", "N", text)
  return sorted(re.sub(r"\[\s+", "[", re.sub(r"[ ]+", " ", line)) for line in numbers.strip().splitlines())


@pytest.mark.parametrize("page", sorted({page for page in PAGES if PYTHON.search(PAGES[page])} - {*OWN_TESTS}))
def test_python_runs_and_prints_what_it_says(page, place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  load = codebind_jax.api.load
  monkeypatch.setattr(codebind_jax.api, "load", lambda source, **options: load(
    str(place / "clip") if str(source).startswith("hf:") else source, **options))  # fmt: skip
  names: dict = {}
  for snippet, printed in PYTHON.findall(PAGES[page]):
    capsys.readouterr()
    exec(compile(snippet, page, "exec"), names)
    if printed:
      assert shape_of(capsys.readouterr().out) == shape_of(printed)
  if page == "README.md":
    assert sum(bool(printed) for _, printed in PYTHON.findall(PAGES[page])) == 1
  if page == "docs/use.md":
    assert names["ids"].shape == names["scores"].shape == (2, 5) and (place / "images.parquet").is_file()
    assert names["similarity"].shape == (1, 2) and names["codes"].shape == (1, 16)
  if page == "docs/config.md":
    assert names["get_config"]().steps == 100


def commands():
  """(page, module, its arguments) of every command on a page."""
  for page, text in PAGES.items():
    for module, arguments in COMMAND.findall(text):
      words = re.split(r"\s+#\s", arguments.replace("\\\n", " "))[0]
      yield page, module, [word.strip("'") for word in re.findall(r"'[^']*'|--[\w.]+=\"[^\"]*\"|\S+", words)]


def test_modules_of_commands_exist():
  found = {module for _, module, _ in commands()}
  assert {"codebind_jax.main", "codebind_jax.tools.sweep", "benchmarks.input"} <= found
  for module in found:
    assert importlib.util.find_spec(module), module


def test_configs_and_keys_of_commands_exist(place):
  seen = set()
  for _, _, arguments in commands():
    given = [word for word in arguments if re.match(r"--config[.=]", word)]
    file = next((word.partition("=")[2] for word in given if word.startswith("--config=")), "")
    name, _, form = file.partition(":")
    if not name.startswith("configs/") or name == EXAMPLE:
      continue
    seen.add(name)
    form = str(place / "clip") if form == "WEIGHTS" else form
    config = command_line.read_file(f"{REPOSITORY / name}{f':{form}' if form else ''}", given)
    for word in given:
      key = word.partition("=")[0].removeprefix("--config.")
      if not word.startswith("--config=") and not re.search(r"\b[A-Z]+\b", key):
        schema.get(config, key)
      if ".losses." in key and not key.endswith("TERM"):
        assert key.rpartition(".")[2] in TERMS, key
  assert {"configs/stage1.py", "configs/bind.py", "configs/eval.py", "configs/embed.py", "configs/compare.py"} <= seen


def test_sweeps_are_grids():
  found = [words for _, module, words in commands() if module == "codebind_jax.tools.sweep" and len(words) > 2]
  assert found
  for words in found:
    assert sweep.grid_of([word for word in words if word.startswith("--config")]).points


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
  for path in re.findall(r"\b(?:launch|configs|tests|docs)/[\w./]+\.(?:sh|py|sbatch|ipynb|md|svg)\b", PAGES[page]):
    if path != EXAMPLE:
      assert (REPOSITORY / path).is_file(), path


def anchors(text):
  """Addresses of a page's headings."""
  titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page):
  for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
    path, _, anchor = link.partition("#")
    target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_first_page_is_short():
  assert len(PAGES["README.md"].splitlines()) <= 150
