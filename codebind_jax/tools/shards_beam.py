"""Shards of raw media under Apache Beam, for data too large for the processes of one machine.

Command: python -m codebind_jax.tools.shards_beam IN [IN ...] OUT --size=1GB [flags of tools.shards] \
             --beam=--runner=DirectRunner --beam=--direct_num_workers=2
Needs the extra `beam`. Every `--beam` is passed to Beam: --runner=DataflowRunner, FlinkRunner, ... The workers see IN
and OUT under the same paths; this machine makes the plan, with `--workers` processes. The shards are those of
`tools.shards`, byte for byte, and either command goes on where the other was killed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from absl import app, flags
from apache_beam.options.pipeline_options import PipelineOptions

from codebind_jax.data.records import Source
from codebind_jax.data.shards import Job, Plan, read_plan, write_summary
from codebind_jax.files import lock
from codebind_jax.tools.shards import define_flags, opened, planned, told


class WriteShard(beam.DoFn):
  """From a shard's number to its report; each worker opens the input once, whose index is not sent to it."""

  def __init__(self, files: Sequence[str], max_bad_records: int, folder: str):
    self._files, self._max_bad_records, self._folder = tuple(files), max_bad_records, folder

  def setup(self) -> None:
    """Opens the input."""
    folder = Path(self._folder)
    plan = read_plan(folder)
    self._job = Job.of(opened(self._files, plan.split, self._max_bad_records), plan, folder)

  def process(self, number: int) -> Iterator[dict[str, Any]]:
    """Writes a shard; Beam may ask for one twice, which finds it finished."""
    yield self._job.write(number)


def _finish(reports: Sequence[dict[str, Any]], folder: str) -> None:
  write_summary(read_plan(Path(folder)), Path(folder), reports)


def write_with_beam(
  source: Source, plan: Plan, folder: Path, files: Sequence[str], max_bad_records: int = 0, options: Sequence[str] = ()
) -> None:
  """Writes the shards that are not finished yet, compares those that are, and writes the summary.

  Args:
    source: the input.
    plan: made of it.
    folder: of the shards.
    files: the input's names, as the workers see them.
    max_bad_records: as the plan was made with.
    options: command-line options of Beam.

  Raises:
    ValueError: naming what is wrong with the folder. Errors in workers come as the runner's.
  """
  job = Job.of(source, plan, folder)
  folder.mkdir(parents=True, exist_ok=True)
  with lock(folder / ".lock", f"writes shards into {folder}"):
    job.begin()
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      numbers = pipeline | beam.Create(range(len(plan.parts))) | beam.Reshuffle()
      reports = numbers | beam.ParDo(WriteShard(files, max_bad_records, str(folder)))
      reports | beam.combiners.ToList() | beam.Map(_finish, folder=str(folder))


def main(argv: Sequence[str]) -> None:
  """Reads the flags."""
  own = flags.FLAGS
  try:
    source, plan, folder = planned(argv)
    kept = sum(plan.path(folder, number).exists() for number in range(len(plan.parts)))
    write_with_beam(source, plan, folder, argv[1:-1], own.max_bad_records, own.beam)
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
  sys.stdout.write(told(plan, folder, kept))


if __name__ == "__main__":  # flags of its own: importing it defines none
  define_flags()
  flags.DEFINE_multi_string("beam", [], "An option of Beam's, such as --runner=DirectRunner.")
  app.run(main)
