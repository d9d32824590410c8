"""Test setup: offline, on CPU, shapes checked at run time, compiled programs cached between runs."""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept between runs and shared with the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

install_import_hook("codebind_jax", "beartype.beartype")

flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser):
  parser.addoption("--kill-seed", type=int, default=0, help="where the slow test of kill -9 kills")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """Manifest of the coloured squares, and where their features are kept."""
  from tests.train_fixtures import write_manifest

  folder = tmp_path_factory.mktemp("data")
  return write_manifest(folder / "squares"), folder / "root"


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
  """Folder and final metrics of a tiny run that nothing disturbs, to be read only."""
  from codebind_jax.train import train_and_evaluate
  from tests.train_fixtures import tiny_config

  assert not jax.config.values["jax_disable_most_optimizations"], "runs are compared bit for bit"
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, train_and_evaluate(tiny_config(*data), workdir)


@pytest.fixture(scope="module")
def quick_compiler():
  """For modules whose tests cost little but compile time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
