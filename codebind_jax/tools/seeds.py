"""One config over several seeds: mean and standard deviation beside the baseline.

Command: python -m codebind_jax.tools.seeds --config=configs/stage1.py --workdir=DIR --seeds=3 [--config.KEY=VALUE ...]
             [--parallel=N]
Runs go to DIR/seed0, DIR/seed1, ...; finished ones are not run again, killed ones continue. The table is printed and
written to DIR/seeds.md. Hosts that share DIR take different seeds if each is given the command.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app, flags, logging

from codebind_jax import files
from codebind_jax.command_line import define_config, parse
from codebind_jax.evaluators.intervals import is_about
from codebind_jax.runtime import signals
from codebind_jax.tools import runs
from codebind_jax.tools.runs import BASELINE


def table(runs: Sequence[Mapping[str, float]], prefix: str = "eval/") -> str:
  """Markdown table of mean and sample standard deviation over runs: the run, the baseline, and run minus baseline.

  Args:
    runs: final metrics of each seed; the baseline's names begin with `baseline/`.
    prefix: of the metrics shown.
  """

  def cell(values: Sequence[float], sign: str = "") -> str:
    if not values:
      return ""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{deviation}"

  names = [name for name in runs[0] if name.startswith(prefix) and not is_about(name)]
  lines = [f"| metric, {len(runs)} seeds | CodeBind | baseline | difference, seed by seed |", "|---|---|---|---|"]
  for name in names:
    own, baseline = ([run[key] for run in runs if key in run] for key in (name, BASELINE + name))
    differences = [run[name] - run[BASELINE + name] for run in runs if name in run and BASELINE + name in run]
    lines.append(f"| {name} | {cell(own)} | {cell(baseline)} | {cell(differences, '+')} |")
  return "\n".join(lines) + "\n"


def main(_: Sequence[str]) -> None:
  """Runs every seed and writes the table."""
  if flags.FLAGS.config is None or not flags.FLAGS.workdir:
    sys.exit("error: --config=FILE.py and --workdir=DIR are both needed")
  configs = {}
  for seed in range(flags.FLAGS.seeds):
    config = flags.FLAGS.config.copy_and_resolve_references().unlock()
    config.seed = seed
    configs[f"seed{seed}"] = config.lock()
  try:
    folder = files.path(flags.FLAGS.workdir)
    valid = runs.checked(configs, folder)
    done = runs.train_all(valid, folder, flags.FLAGS.parallel)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  diverged = [name for name, metrics in done.items() if not metrics]
  if diverged:
    sys.exit(f"error: {', '.join(diverged)} diverged, see {folder}/*/{runs.DIVERGED}")
  if len(done) < len(valid):
    left = ", ".join(name for name in valid if name not in done)
    sys.stdout.write(f"not finished, or in other processes' hands: {left}; the same command prints the table then\n")
    return
  text = table(list(done.values()))
  files.write_whole(folder / "seeds.md", text)
  sys.stdout.write(text)


if __name__ == "__main__":  # flags of its own: importing it defines none
  define_config()
  runs.define_flags()
  flags.DEFINE_integer("seeds", 3, "Number of seeds: 0, 1, ...", lower_bound=1)
  logging.set_verbosity(logging.WARNING)
  signals.command(app.run, main, flags_parser=parse)
