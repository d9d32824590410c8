"""One of two processes that differ in one thing after another; prints what each comparison said.

`python -m tests.agreement_worker PORT PROCESS MANIFEST OTHER_MANIFEST SHORTER_MANIFEST RENAMED_MANIFEST`
"""

import json
import pathlib
import sys

from absl import flags

from codebind_jax.data import open_source
from codebind_jax.runtime import agreement, distributed


def said(check, *arguments):
  """The error of a comparison; "" where it finds none."""
  try:
    check(*arguments)
  except ValueError as error:
    return str(error)
  return ""


def compared(process, manifest, other, shorter, renamed):
  """What each comparison said."""
  config = {"optim": {"learning_rate": 0.001}, "data": {"workers": process}}
  faster = {"optim": {"learning_rate": (0.001, 0.002)[process]}, "data": {"workers": 0}}
  real = agreement.package_files
  source = lambda path: {"squares": open_source(path)}
  told = {
    "same": said(agreement.check_command, config, "run") + said(agreement.check_sources, source(manifest)),
    "config": said(agreement.check_command, faster, "run"),
    "workdir": said(agreement.check_command, config, f"run{process}"),
    "content": said(agreement.check_sources, source([manifest, other][process])),
    "records": said(agreement.check_sources, source([manifest, shorter][process])),
  }
  versions = agreement.environment
  agreement.environment = lambda: versions() | {"version of jax": f"0.9.{process}"}
  told |= {"version": said(agreement.check_command, config, "run")}
  agreement.environment = versions
  told |= {"names": said(agreement.check_sources, {"squares" if process else "circles": open_source(manifest)})}
  told |= {"ids": said(agreement.check_sources, source([manifest, renamed][process]))}
  agreement.package_files = lambda: real() | {"codebind_jax/step.py": str(process)}
  return told | {"code": said(agreement.check_command, config, "run")}


if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  port, process, *paths = sys.argv[1:]
  distributed.start(f"127.0.0.1:{port}", 2, int(process))
  told = compared(int(process), *map(pathlib.Path, paths))
  sys.stdout.write(json.dumps(told) + "\n")
  distributed.finish()
