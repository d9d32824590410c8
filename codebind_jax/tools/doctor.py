"""Describes this installation, for a first look and for issue reports: `python -m codebind_jax.tools.doctor`.

Exit code 1 if something that every run needs does not work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

from absl import app

import codebind_jax
from codebind_jax.data.worlds import fetch

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "array_record")
# A module of each extra of setup.cfg that is importable where the extra is installed.
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin", "search": "faiss", "engine": "duckdb", "beam": "apache_beam",
          "hub": "huggingface_hub", "gcs": "gcsfs", "s3": "s3fs", "parity": "torch", "bench": "threadpoolctl",
          "data": "av", "test": "pytest"}


def findings() -> Iterator[tuple[str, str, bool]]:
  """(subject, finding, whether a run can work with it); always True for what is optional."""
  yield "codebind_jax", f"{codebind_jax.__version__}, Python {platform.python_version()}, {platform.platform()}", True
  for name in LIBRARIES:
    try:
      yield name, importlib.metadata.version(name), True
    except importlib.metadata.PackageNotFoundError:
      yield name, "missing: pip install -e .", False
  yield "devices", *_devices()
  installed = {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()}
  yield "extras", ", ".join(f"{extra} {'yes' if found else 'no'}" for extra, found in installed.items()), True
  yield "data folder", *_data_folder()
  for client in sorted(set(fetch.CLIENT.values())):
    yield f"client {client}", _client(client), True


def _devices() -> tuple[str, bool]:
  import jax

  try:
    devices = jax.devices()
  except RuntimeError as error:
    return str(error).splitlines()[0], False
  return f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})", True


def _data_folder() -> tuple[str, bool]:
  folder = fetch.data_dir()
  try:
    fetch.make_folder(folder)
  except OSError as error:
    return str(error), False
  return f"{folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free", True


def _client(name: str) -> str:
  """Version that a package client reports; only a fetch shows whether it reaches its registry."""
  command = [sys.executable, "-m", "pip"] if name == "pip" else [name]
  try:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
  except (OSError, subprocess.SubprocessError):
    return "does not answer; worlds will hold less"
  return result.stdout.splitlines()[0].split(" from ")[0]


def main(_: list[str]) -> None:
  """Prints the findings."""
  rows = list(findings())
  sys.stdout.write("".join(f"{'' if well else '! '}{what}: {text}\n" for what, text, well in rows))
  sys.exit(0 if all(well for *_, well in rows) else 1)


if __name__ == "__main__":
  app.run(main)
