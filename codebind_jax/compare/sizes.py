"""Items of so many bytes: trained codes beside quantisers of the best continuous model (`config.compare.bytes`).

The baseline is the continuous variant, with its regularisation and rate, that the validation sets choose. Each seed's
run of it is quantised by faiss, fitted to its own training embeddings, and is the start of the codes' runs that are
`warm`. The test sets are read once, by the call with `config.test`, from finished runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float

from codebind_jax import files, schema
from codebind_jax.api import Model
from codebind_jax.compare import quantisers
from codebind_jax.compare.runs import Runs, loaded, run_config
from codebind_jax.compare.search import Search, Vectors
from codebind_jax.compare.sizes_table import write_sizes
from codebind_jax.config import Bytes, Config
from codebind_jax.data.task import Task
from codebind_jax.trunks.feeds import Feeder

QUANTISED = "quantised_{}.json"  # metrics of the quantisers on the sets of a role, in the folder of a baseline's run
MEASURED = "measured_{}.json"  # metrics of a run on the sets of a role


def compare_sizes(config: Config, folder: files.Path, task: Task, feeder: Feeder, feeds: Any) -> dict[str, Any]:
  """Trains the variants, measures them and the quantisers, and writes comparison.md and .json; see `compare`."""
  settings = config.compare
  first = run_config(config, settings.variants[settings.names[0]], settings.learning_rates[0], 0, config.test)
  search = Search(first, task, feeder)
  runs = Runs(config, folder, feeds, {False: search, True: search}, test=False)
  seeds, roles = range(1, settings.seeds + 1), search.roles
  rows: list[dict[str, Any]] = []
  for name in settings.names:
    rate, tried = runs.chosen(name)
    if name in settings.bytes.baselines:  # of these only the best has to have a run a seed
      continue
    found = [runs.seed(name, seed)["metrics"] for seed in seeds]
    at = [runs.place(name, rate, seed, True) for seed in seeds]
    found = [metrics | _further(search, place, roles[1:]) for metrics, place in zip(found, at)]
    variant = runs.variant(name)
    size = {shared for shared, _ in run_config(config, variant, rate, 0, False).item_bytes.values()}
    kind = "warm" if variant.warm else "cold"
    rows.append(_row(name, max(size, default=4 * config.model.shared_dim), found, rate=rate, tried=tried, kind=kind))
  if set(settings.names) != set(settings.variants):
    sys.stdout.write(f"trained {', '.join(settings.names)} of {len(settings.variants)} variants in {folder}; the same "
                     "command without --config.compare.only collects all and writes comparison.md\n")  # fmt: skip
    runs.bar.close()
    return {"summary": task.summary, "results": rows}
  best = runs.best(settings.bytes.baselines)
  trained = [runs.seed(best, seed) for seed in seeds]
  runs.bar.close()
  at = [runs.place(best, runs.chosen(best)[0], seed, True) for seed in range(1, len(trained) + 1)]
  rows = [*_quantised(search, at, roles, settings.bytes), *rows]
  baselines = {name: {"learning_rate": runs.chosen(name)[0], "tuning": _tuning(runs.chosen(name)[1])}
               for name in settings.bytes.baselines}  # fmt: skip
  comparison = {
    "summary": task.summary, "config": schema.to_plain(config), "baseline": best, "baselines": baselines,
    "roles": list(roles), "results": rows,
  }  # fmt: skip
  sys.stdout.write(write_sizes(folder, comparison))
  return comparison


def _tuning(tried: Mapping[float, float | None]) -> dict[str, float | None]:
  return {f"{rate:g}": tried[rate] for rate in sorted(tried)}


def _row(
  name: str, size: int, found: Sequence[Mapping[str, float]], *, kind: str, rate: float | None = None,
  tried: Mapping[float, float | None] | None = None,
) -> dict[str, Any]:
  """What is kept of one row of the table: `runs` are metrics by seed, `kind` quantiser, warm or cold."""
  return {"name": name, "bytes": size, "kind": kind, "learning_rate": rate, "tuning": _tuning(tried or {}),
          "runs": list(found)}  # fmt: skip


def _further(search: Search, place: files.Path, roles: Sequence[str]) -> dict[str, float]:
  """The metrics of a finished run on the sets of more roles, measured once."""
  found: dict[str, float] = {}
  for role in roles:
    path = place / MEASURED.format(role)
    if not files.is_file(path):
      files.write_sealed(path, search.measured(search.vectors(loaded(place, search), (role,))))
    found |= files.read_sealed(path)
  return found


def _quantised(
  search: Search, places: Sequence[files.Path], roles: Sequence[str], settings: Bytes
) -> list[dict[str, Any]]:
  """The rows of the quantisers: each fitted to and applied to every run of the baseline, in its folder in `places`."""
  wanted = [(name, size, fit) for name in settings.quantisers if name not in quantisers.FLOATS
            for size in settings.sizes for fit in settings.fits]  # fmt: skip
  wanted += [(name, 0, "joint") for name in settings.quantisers if name in quantisers.FLOATS]
  found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
  bar = tqdm.tqdm(total=len(wanted) * len(places), unit="quantiser", disable=None)
  for seed, place in enumerate(places, 1):
    bar.set_description(f"quantisers of seed {seed}")
    measured = {role: files.read_sealed(path) if files.is_file(path := place / QUANTISED.format(role)) else {}
                for role in roles}  # fmt: skip
    vectors: dict[str, Vectors] = {}
    for name, size, fit in wanted:
      key = "/".join((name, str(size), fit))
      if missing := [role for role in roles if key not in measured[role]]:
        model: Model | None = None if set(missing) <= set(vectors) else loaded(place, search)
        for role in missing:
          vectors[role] = vectors[role] if role in vectors else search.vectors(model, (role,))
        decode = decoder(vectors[missing[0]], name, size, fit, seed)
        for role in missing:
          # None where the quantiser has no form of that size
          measured[role][key] = decode and search.measured(vectors[role].by(decode[1])) | {"bytes": decode[0]}
          files.write_sealed(place / QUANTISED.format(role), measured[role])
      whole = {}
      for role in roles:
        whole |= measured[role][key] or {}
      if whole:
        found.setdefault((name, size, fit), []).append(whole)
      bar.update()
  bar.close()
  rows = []
  for (name, _, fit), of_seeds in found.items():
    label = name if name in quantisers.FLOATS or len(settings.fits) == 1 else f"{name}, {fit}"
    rows.append(_row(label, int(of_seeds[0]["bytes"]), of_seeds, kind="quantiser"))
  return rows


def decoder(
  vectors: Vectors, name: str, size: int, fit: str, seed: int
) -> tuple[int, Callable[[str, Float[np.ndarray, "n d"]], Float[np.ndarray, "n d"]]] | None:
  """(bytes an item, (modality, vectors) -> what their codes stand for) of a quantiser fitted to training vectors.

  None if the quantiser has no form of that size, or there are too few rows to fit it to.

  Args:
    vectors: of the baseline.
    name: of the quantiser.
    size: bytes an item; 0 for floats, which have a size of their own.
    fit: `joint` or `modality`, see `Bytes`.
    seed: of its random draws.
  """
  rows = {m: vectors.rows_of(m) for m in vectors.modalities}
  if fit == "joint":
    rows = dict.fromkeys(rows, np.concatenate(list(rows.values())))
  width = next(iter(rows.values())).shape[1]
  size = size or width * np.dtype(quantisers.FLOATS[name]).itemsize
  if not quantisers.fitting(name, width, size) or min(map(len, rows.values())) < quantisers.rows_needed(name, size):
    return None
  made: dict[int, quantisers.Fitted] = {}
  for x in rows.values():
    if id(x) not in made:
      made[id(x)] = quantisers.fit(name, size, x, seed)
  return made[id(x)].item_bytes, lambda m, values: made[id(rows[m])].decoded(values)
