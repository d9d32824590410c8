"""Test setup: offline, on CPU, shapes checked at run time, programs compiled fast and kept between runs."""

import ctypes
import fcntl
import gc
import json
import logging
import os
import pathlib
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of what the suite costs is compile time, of programs that run for milliseconds. LLVM's optimisations are off, and
# XLA's fusion emitters, which load MLIR's dialects anew for each program. Processes that tests start inherit the flags:
# runs that are compared bit for bit are compiled alike.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
  f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
)
# Compiled programs, the smallest ones too, are kept between runs and shared with the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

install_import_hook("codebind_jax", "beartype.beartype")

flags.FLAGS.mark_as_parsed()
# A shell's job in the background ignores Ctrl-C, and so would the processes that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
  parser.addoption("--kill-seed", type=int, default=0, help="where the slow test of kill -9 kills")


@pytest.fixture(autouse=True)
def remarks_are_made_anew():
  """What a process says once, each test may hear."""
  from codebind_jax.data import reading

  reading._made.clear()


@pytest.fixture(autouse=True)
def absl_logs_at_the_level_of_the_root():
  """A command that a test calls sets the verbosity of its process, which other tests share."""
  logging.getLogger("absl").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_files():
  """Frees a file's compiled programs, about a megabyte each; those that are needed again are read from disk."""
  yield
  jax.clear_caches()
  gc.collect()
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):  # without it glibc keeps what was freed
    libc.malloc_trim(0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """Makes things once for all of pytest's workers: shared(name, make) is the folder that make(folder) has filled."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

  def get(name, make):
    folder = base / name
    with open(folder.with_suffix(".lock"), "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (folder / "done").exists():
        make(folder)
        (folder / "done").touch()
    return folder

  return get


@pytest.fixture(scope="session")
def data(shared):
  """Manifest of the coloured squares, and where their features are kept."""
  from tests.train_fixtures import write_manifest

  folder = shared("data", lambda folder: write_manifest(folder / "squares"))
  return folder / "squares" / "squares.jsonl", folder / "root"


@pytest.fixture(scope="session")
def whole_run(data, shared):
  """Folder and final metrics of a tiny run that nothing disturbs, to be read only."""
  from codebind_jax.train import train_and_evaluate
  from tests.train_fixtures import tiny_config

  def make(folder):
    assert not jax.config.values["jax_disable_most_optimizations"], "runs are compared bit for bit"
    final = train_and_evaluate(tiny_config(*data), folder / "run")
    (folder / "final.json").write_text(json.dumps(final))

  folder = shared("whole", make)
  return folder / "run", json.loads((folder / "final.json").read_text())


@pytest.fixture(scope="session")
def trained(data, whole_run):
  """Manifest, data folder and workdir of a finished run, to be read only."""
  return *data, whole_run[0]


@pytest.fixture(scope="module")
def quick_compiler():
  """For modules whose tests cost little but compile time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
