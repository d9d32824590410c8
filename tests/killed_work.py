"""Work in a process of its own that kills itself: `python -m tests.killed_work KIND FOLDER KILL_AT [ARGUMENT ...]`.

Events are those of `tests.run_tiny`; with -1 it prints how many there were.
"""

import pathlib
import sys

from absl import flags

from tests.run_tiny import kill_self


def embed(folder, run, manifest):
  """All shards of a job of mode `embed`."""
  from codebind_jax.embedding.job import embed as command
  from configs import embed as shipped

  config = shipped.get_config().unlock()
  config.update_from_flattened_dict({"init_from": run, "data.manifest": manifest, "embed.shard_rows": 8})
  return lambda: command(config.lock(), folder)


def save(folder, run):
  """A saved model in the place of an older one."""
  import codebind_jax

  model = codebind_jax.load(run)
  return lambda: model.save(folder / "model")


def shards(folder, manifest):
  """ArrayRecord shards of records."""
  from codebind_jax.data.opening import open_source
  from codebind_jax.data.shards import Job, make_plan, write_all

  source = open_source(manifest)
  job = Job.of(source, make_plan(source, 2_000, check="none"), folder)
  return lambda: write_all(job)


def index(folder):
  """An index in the place of an older one."""
  import numpy as np

  from codebind_jax.search import Index

  made = Index("numpy")
  made.add([f"{n}" for n in range(500)], np.random.default_rng(0).normal(size=(500, 32)))
  return lambda: made.save(folder / "index.parquet")


def prepare(folder):
  """A packaged world as `tools.prepare` builds it, of a package that is fetched."""
  from codebind_jax.data.worlds import fetch, names, registry
  from tests.world_fixtures import recording

  table, package = recording(folder)
  names.table, fetch.packages = lambda name: table, lambda: {"neurokit2": package}
  return lambda: registry.ensure("evoked", "small", folder, again=True)


def world(folder):
  """The records, index and manifest of a world."""
  from tests.world_fixtures import small_world

  return lambda: small_world(folder)


def compare(folder):
  """A comparison of two rates of one method."""
  from codebind_jax.compare.run import compare as command
  from tests.test_compare import small

  config = small(folder, "fixed_anchor_image")
  return lambda: command(config, folder / "run")


if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  kind, where, at, *arguments = sys.argv[1:]
  work = globals()[kind](pathlib.Path(where), *arguments)
  events = kill_self(int(at))
  work()
  sys.stdout.write(f"{next(events)} events\n")
