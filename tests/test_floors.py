"""Rooms of the package (its folders and root modules) import rooms below them alone, also inside functions."""

import ast
import pathlib
import subprocess
import sys

import codebind_jax

ROOT = pathlib.Path(codebind_jax.__file__).parent
# From the top floor down; rooms of one floor do not import each other.
FLOORS = (
  "main tools", "__init__", "compare", "train", "evaluate", "report search", "embedding initialise",
  "api compile_ahead",
  "saving", "command_line config step", "methods", "trunks", "compositional models", "losses",
  "codebook data runtime transport",
  "evaluators files norm stages", "schema",
)  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def room_of(module):
  """The room of a dotted name; names that are no module of the root belong to the package itself."""
  parts = module.split(".")
  return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def imports(source):
  """Dotted names of this package that a source text imports, anywhere in it."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "codebind_jax":
      alone = node.module == "codebind_jax"
      yield from (f"{node.module}.{alias.name}" for alias in node.names) if alone else [node.module]
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "codebind_jax")


def upward(path, source):
  """What a file imports from its own floor or above, outside its room."""
  room = room_of(f"codebind_jax.{path.parts[0].removesuffix('.py')}")
  return [name for name in imports(source) if room_of(name) != room and FLOOR[room_of(name)] <= FLOOR[room]]


def test_every_room_stands_on_one_floor():
  rooms = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
  assert rooms == set(FLOOR) and len(rooms) <= 30


def test_rooms_import_rooms_below_them_alone():
  files = sorted(ROOT.rglob("*.py"))
  found = {str(f.relative_to(ROOT)): upward(f.relative_to(ROOT), f.read_text(encoding="utf-8")) for f in files}
  assert len(files) > 100 and {file: names for file, names in found.items() if names} == {}


def test_an_import_of_a_room_above_is_seen_also_inside_a_function():
  path = pathlib.Path("losses/new.py")
  assert upward(path, "def f():\n  from codebind_jax.step import mixed\n") == ["codebind_jax.step"]
  assert upward(path, "from codebind_jax import train, norm") == ["codebind_jax.train"]
  assert upward(path, "import codebind_jax.models.towers") == ["codebind_jax.models.towers"]
  assert upward(path, "from codebind_jax.losses.masks import masked_mean\nfrom codebind_jax import codebook") == []


def test_data_imports_no_jax():
  for file in (ROOT / "data").rglob("*.py"):
    modules = [
      name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
      for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                   [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
    ]  # fmt: skip
    assert not [name for name in modules if (name or "").split(".")[0] in ("jax", "flax")], file


def test_data_can_be_imported_where_there_is_no_jax():
  """All of it, also through other rooms and packages; Grain takes JAX where it finds it, so it must find none."""
  code = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("jax", "flax", "torch", "tensorflow"))
import codebind_jax.data
names = [module.name for module in pkgutil.walk_packages(codebind_jax.data.__path__, "codebind_jax.data.")]
for name in names:
  importlib.import_module(name)
print(*names)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
  assert done.returncode == 0, done.stderr
  files = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts) for f in (ROOT / "data").rglob("*.py")}
  assert set(done.stdout.split()) == {name for name in files if not name.endswith("__init__")} | {
    name.removesuffix(".__init__") for name in files if name.endswith(".__init__")} - {"codebind_jax.data"}  # fmt: skip
