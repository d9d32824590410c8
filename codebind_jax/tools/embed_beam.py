"""The job of mode `embed` under Apache Beam, for data too large for machines that are started by hand.

Command: python -m codebind_jax.tools.embed_beam --config=configs/embed.py --workdir=OUT --config.init_from=RUN \
             --config.data.manifest=FILE.jsonl --beam=--runner=DirectRunner --beam=--direct_num_workers=2
Needs the extra `beam`. Every `--beam` is passed to Beam: --runner=DataflowRunner, FlinkRunner, ... The workers see
OUT, RUN and the manifest under the same paths. The shards are those of mode `embed`, which may be mixed with this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from absl import app, flags
from apache_beam.options.pipeline_options import PipelineOptions

from codebind_jax import files
from codebind_jax.api import load
from codebind_jax.command_line import define_config, parse
from codebind_jax.config import validation
from codebind_jax.embedding.job import Plan, embed_shard, make_plan, summarise


class EmbedShard(beam.DoFn):
  """From a shard's number to the number of its rows; each worker loads the model once."""

  def __init__(self, plan: Plan, run: str):
    self._plan, self._run = plan, run

  def setup(self) -> None:
    """Loads the model."""
    self._model = load(self._run)

  def process(self, number: int) -> Iterator[int]:
    """Computes a shard; Beam may ask for one twice, which writes the same file again."""
    yield embed_shard(self._plan, number, self._model).rows


def embed_with_beam(config: Any, workdir: str, options: Sequence[str] = ()) -> dict[str, Any]:
  """Computes the shards that are not finished yet, and the summary.

  Args:
    config: `configs/embed.py`.
    workdir: where the shards go.
    options: command-line options of Beam.

  Returns:
    The summary.

  Raises:
    ValueError: naming what is wrong with the run, the manifest or the folder. Errors in workers come as the runner's.
  """
  config = validation.validate(config)
  run = config.init_from
  plan = make_plan(config.embed, config.data, workdir, load(run))
  files.make_folder(plan.folder)
  missing = plan.missing()
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    pipeline | beam.Create(missing) | beam.Reshuffle() | beam.ParDo(EmbedShard(plan, run))
  return summarise(plan, run)


def main(_: Sequence[str]) -> None:
  """Reads the flags."""
  if flags.FLAGS.config is None or not flags.FLAGS.workdir:
    sys.exit("error: --config=FILE.py and --workdir=DIR are both needed")
  try:
    embed_with_beam(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.beam)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":  # flags of its own: importing it defines none
  define_config()
  flags.DEFINE_string("workdir", None, "Folder of the shards.")
  flags.DEFINE_multi_string("beam", [], "An option of Beam's, such as --runner=DirectRunner.")
  app.run(main, flags_parser=parse)
