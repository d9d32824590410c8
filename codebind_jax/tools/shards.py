"""Writes records of any source as ArrayRecord shards of raw media, about `--size` bytes each.

Command: python -m codebind_jax.tools.shards IN [IN ...] OUT --size=1GB [--workers=N] [--split=train] [--name=NAME]
         [--max_bad_records=N] [--check=auto|all|some|none]

IN is what `--config.data.manifest` takes: files of records of any format, or `world:NAME`. OUT gets the shards
NAME-00000-of-00012.array_record, `plan.json`, and `shards.json` when all are finished. Media are kept as they were
stored. The same command goes on after a kill: finished shards are compared with the input and kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from codebind_jax.data.opening import open_source
from codebind_jax.data.records import Source
from codebind_jax.data.shards import Job, Plan, make_plan, parse_size, shown, write_all
from codebind_jax.runtime import signals


def define_flags() -> None:
  """Defines the flags of a command that writes shards."""
  flags.DEFINE_string("size", "1GB", "Bytes of fields and media of a shard, about: 500MB, 1GB, 64MiB.")
  flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes; as many as CPU cores unless given.", lower_bound=1)
  flags.DEFINE_string("split", "", "Split of the input that is taken; all of it unless given.")
  flags.DEFINE_string("name", "", "How the shards' names begin; the input's name unless given.")
  flags.DEFINE_integer("max_bad_records", 0, "Bad records that are left out before it is an error.", lower_bound=0)
  about = "Whose files are opened before: all of up to 10,000 records, and 1,000 of more, unless given."
  flags.DEFINE_enum("check", "auto", ["auto", "all", "some", "none"], about)


def opened(files: Sequence[str], split: str, max_bad_records: int) -> Source:
  """The records of the command's inputs; their files are looked at by the plan."""
  names = files[0] if len(files) == 1 else list(files)
  return open_source(names, split=split, max_bad_records=max_bad_records, check="none")


def planned(argv: Sequence[str]) -> tuple[Source, Plan, Path]:
  """Source, plan and folder of a command line.

  Raises:
    ValueError, OSError: naming what is wrong with it, or with the input.
  """
  if len(argv) < 3:
    raise ValueError("needed are IN and OUT")
  own, size = flags.FLAGS, parse_size(flags.FLAGS.size)
  source = opened(argv[1:-1], own.split, own.max_bad_records)
  plan = make_plan(source, size, name=own.name, split=own.split, max_bad_records=own.max_bad_records, check=own.check,
                   workers=own.workers)  # fmt: skip
  return source, plan, Path(argv[-1])


def told(plan: Plan, folder: Path, kept: int) -> str:
  """What was done, in a line."""
  left = f", {len(plan.left_out)} bad records left out" if plan.left_out else ""
  return (f"{folder}: {len(plan.parts)} shards of {plan.records:,} records, {shown(plan.bytes)}{left}; "
          f"{len(plan.parts) - kept} written, {kept} kept; all read back and equal to the input\n")  # fmt: skip


def main(argv: Sequence[str]) -> None:
  """Reads the command line."""
  try:
    source, plan, folder = planned(argv)
    _, kept = write_all(Job.of(source, plan, folder), flags.FLAGS.workers)
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
  sys.stdout.write(told(plan, folder, kept))


if __name__ == "__main__":  # flags of its own: importing it defines none
  define_flags()
  signals.command(app.run, main)
