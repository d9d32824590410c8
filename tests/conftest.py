"""Test setup: offline, on CPU, shapes checked at run time, compiled programs cached between runs."""

import fcntl
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


@pytest.fixture(scope="module")
def quick_compiler():
  """For modules whose tests cost little but compile time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """Manifest, data folder and workdir of a tiny finished run, to be read only; pytest's workers share one."""
  from codebind_jax.train import train_and_evaluate
  from tests.train_fixtures import tiny_config, write_manifest

  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
  with open(folder.with_suffix(".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "done").exists():
      manifest = write_manifest(folder / "squares")
      train_and_evaluate(tiny_config(manifest, folder / "root", steps=2), folder / "run")
      (folder / "done").touch()
  return folder / "squares" / "squares.jsonl", folder / "root", folder / "run"
