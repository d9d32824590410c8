"""SIGTERM and Ctrl-C while embeddings, an evaluation, a comparison or shards are made: one line, and it goes on."""

import json
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from codebind_jax.runtime import signals
from tests.processes import REPOSITORY, environment
from tests.test_signals import STOPPED, said, told

MAIN = [sys.executable, "-m", "codebind_jax.main", f"--stopped_exit_code={STOPPED}"]


def of_data(trained):
  return [f"--config.data.manifest={trained[0]}", f"--config.data.root={trained[1]}"]


def embed(trained, out):
  return [*MAIN, "--config=configs/embed.py", f"--workdir={out}", f"--config.init_from={trained[2]}",
          *of_data(trained), "--config.embed.shard_rows=2"]  # fmt: skip


def evaluation(trained, out):
  return [*MAIN, "--config=configs/eval.py", f"--workdir={out}", f"--config.init_from={trained[2]}", *of_data(trained)]


def shards(trained, out):
  return [sys.executable, "-m", "codebind_jax.tools.shards", str(trained[0]), str(out), "--size=500B", "--workers=1"]


def embedded(out):
  return {path.name: pq.read_table(path).to_pydict() for path in sorted(out.glob("shard-*.parquet"))}


def measured(out):
  lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 1
  return lines


def written(out):
  return {path.name: path.read_bytes() for path in sorted(out.glob("*.array_record"))}


def some(pattern):
  """Whether a folder has a file of a name."""
  return lambda _, out: any(out.glob(pattern))


# Command -> how it is called, when it works, what it leaves, its exit code for SIGTERM.
COMMANDS = {
  "embed": (embed, some("shard-*.parquet"), embedded, STOPPED),
  "eval": (evaluation, said("classes"), measured, STOPPED),
  "shards": (shards, some("*.array_record"), written, 143),
}  # fmt: skip


def finished(arguments):
  done = subprocess.run(arguments, cwd=REPOSITORY, env=environment(1), capture_output=True, text=True, timeout=400)
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_told_while_it_works_a_command_ends_with_one_line_and_goes_on(kind, trained, tmp_path):
  command, ready, content, stopped = COMMANDS[kind]
  finished(command(trained, tmp_path / "whole"))
  want = content(tmp_path / "whole")
  for number, code in ((signal.SIGTERM, stopped), (signal.SIGINT, signals.INTERRUPTED)):
    out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
    arguments = command(trained, out)
    found, text = told(arguments, log, lambda out=out, log=log: ready(log, out), number)
    assert found == code, text[-3000:]
    assert "Traceback" not in text and "the same command goes on" in text.splitlines()[-1]
    finished(arguments)
    assert content(out) == want
