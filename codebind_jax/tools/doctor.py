"""What this installation is and has, for a first look and for issues: `python -m codebind_jax.tools.doctor`.

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

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "array_record")
# A module by which each extra of setup.cfg is known to be there.
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin", "search": "faiss", "beam": "apache_beam",
          "bench": "threadpoolctl", "data": "mne", "test": "pytest"}


def findings() -> Iterator[tuple[str, str, bool]]:
  """(what, finding, whether it is as a run needs it); what is optional is always well."""
  yield "codebind_jax", f"{codebind_jax.__version__}, Python {platform.python_version()}, {platform.platform()}", True
  for name in LIBRARIES:
    try:
      yield name, importlib.metadata.version(name), True
    except importlib.metadata.PackageNotFoundError:
      yield name, "missing: pip install -e .", False
  yield "devices", *_devices()
  there = {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()}
  yield "extras", ", ".join(f"{extra} {'yes' if found else 'no'}" for extra, found in there.items()), True
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
  """What a package client says its version is; whether it reaches a registry only fetching shows."""
  command = [sys.executable, "-m", "pip"] if name == "pip" else [name]
  try:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
  except (OSError, subprocess.SubprocessError):
    return "does not answer; worlds will hold less"
  return done.stdout.splitlines()[0].split(" from ")[0]


def main(_: list[str]) -> None:
  """Prints the findings."""
  found = list(findings())
  sys.stdout.write("".join(f"{'' if well else '! '}{what}: {text}\n" for what, text, well in found))
  sys.exit(0 if all(well for *_, well in found) else 1)


if __name__ == "__main__":
  app.run(main)
