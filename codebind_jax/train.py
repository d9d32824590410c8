"""`train_and_evaluate`: data, model, stages, evaluation, report - one linear run that can be killed and resumed."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import logging

from codebind_jax import build, optim, sharding, summary
from codebind_jax import config as config_lib
from codebind_jax import state as state_lib
from codebind_jax.api import Model
from codebind_jax.checkpoint import Checkpoints, Position
from codebind_jax.codebook import collapsed, usage_stats
from codebind_jax.compositional import init_codebooks, new_codebooks
from codebind_jax.data.featurize import Featurizer
from codebind_jax.data.pipeline import make_iterator
from codebind_jax.data.task import open_task
from codebind_jax.evaluate import Evaluation
from codebind_jax.metrics import MetricsWriter, Throughput
from codebind_jax.models.codebind import whitened
from codebind_jax.report import write_report
from codebind_jax.stages import Stage, stages_of
from codebind_jax.state import TrainState
from codebind_jax.step import make_train_step, new_aux


def banner(text: str) -> None:
  """A line in the log that says which part of the run begins."""
  logging.info("---- %s ----", text)


def claim_workdir(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> pathlib.Path:
  """Makes the run's folder, or checks that the run in it is this one.

  Raises:
    ValueError: if the folder holds a run of another config, naming every key that differs.
    OSError: if it cannot be written.
  """
  folder = pathlib.Path(workdir).expanduser().absolute()
  folder.mkdir(parents=True, exist_ok=True)
  path, plain = folder / "config.json", config_lib.to_plain(config)
  if path.exists():
    changed = config_lib.difference(json.loads(path.read_text()), plain)
    if changed:
      raise ValueError(f"workdir {str(folder)!r} holds a run of another config: {'; '.join(changed)}; use another one")
  elif jax.process_index() == 0:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    partial.rename(path)
  return folder


def baseline_of(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The hard-alignment baseline: same towers, data and steps, plain InfoNCE, no codebooks."""
  plain = ml_collections.ConfigDict(config.to_dict())
  plain.baseline = False
  plain.model.quantize = False
  for entry in plain.stages.values():
    entry.losses = ml_collections.ConfigDict({"info_nce": 1.0})
  return plain.lock()


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains all stages of a config, evaluates, and writes metrics, checkpoints and the report into `workdir`.

  A folder that already holds (part of) this run is continued; a finished one is only reported again.

  Returns:
    The final metrics by name; the baseline's under `baseline/...`.

  Raises:
    ValueError: for a bad config or a workdir of another run, before any work.
  """
  started = time.time()
  config_lib.validate(config)
  folder = claim_workdir(config, workdir)

  banner("data")
  task = open_task(config.data)
  featurizer = Featurizer(config)
  tables, labels = featurizer.train_tables(task.train)
  evaluation = Evaluation(config, task, featurizer)

  final, models = run_stages(config, folder, task, tables, labels, evaluation)
  if config.baseline:
    banner("baseline: the same heads by plain InfoNCE, without codebooks")
    plain = baseline_of(config)
    inner = claim_workdir(plain, folder / "baseline")
    baseline, _ = run_stages(plain, inner, task, tables, labels, Evaluation(plain, task, featurizer))
    final |= {f"baseline/{name}": value for name, value in baseline.items()}

  if jax.process_index() == 0:
    banner("report")
    seconds = {"this command": time.time() - started}
    data = summary.report_data(config, folder, task, evaluation, final, models, seconds)
    write_report(folder / "report.html", data)
    sys.stdout.write(summary.text_table(data) + f"\nreport: {folder / 'report.html'}\n")
  return final


def run_stages(
  config: ml_collections.ConfigDict, folder: pathlib.Path, task: Any, tables: Mapping[str, Any],
  labels: Sequence[str | None], evaluation: Evaluation,
) -> tuple[dict[str, float], dict[str, Model]]:
  """Runs or continues the stages of one config; returns the final metrics and the model before and after training."""
  banner("model")
  mesh = sharding.make_mesh(config.mesh.to_dict())
  model, spec, stages = build.make_model(config), build.make_spec(config), stages_of(config)
  dummy = {name: jnp.zeros((1, *table.features.shape[2:]), jnp.float32) for name, table in tables.items()}

  def init(rng: Any) -> tuple[Any, Any, Any]:
    head_rng, code_rng = jax.random.split(rng)
    codebooks = new_codebooks(code_rng, spec, config.model.towers) if spec else {}
    return model.init(head_rng, dummy)["params"], codebooks, new_aux(stages)

  state = state_lib.create(mesh, jax.random.key(config.seed), init)
  state = state.replace(params=whiten_heads(state.params, config, tables))
  untrained_params = jax.device_get(state.params)  # the step donates its state; the report shows the start as well
  optimizers = {
    stage.name: optim.make_optimizer(state.params, stage.train, config.optim.to_dict(), stage.steps) for stage in stages
  }
  iterator = lambda stage: make_iterator(
    tables, labels, batch_size=stage.batch_size, seed=config.seed, unique_labels=config.data.unique_labels,
    name=task.name,
  )

  with contextlib.closing(Checkpoints(folder, keep=config.keep_checkpoints)) as store, MetricsWriter(
    folder, active=jax.process_index() == 0
  ) as writer:
    # Order of initialisation: this run's own checkpoint, else random heads and k-means codebooks.
    by_name = {stage.name: stage for stage in stages}
    restored = store.restore(
      lambda at: (state_lib.abstract(state, optimizers[at.stage][0], mesh), {task.name: iterator(by_name[at.stage])})
    )
    position, iterators = Position(0, stages[0].name, False), {}
    if restored is None:
      logging.info("no checkpoint: starting from random heads")
    else:
      position, state, iterators = restored
      logging.info("continuing from step %d of stage %r", position.step, position.stage)
    writer.truncate(position.step)

    for stage in stages:
      if stage.last_step <= position.step:
        continue
      banner(f"stage {stage.name}: {stage.steps} steps on {' + '.join(stage.modalities)}")
      tx, table = optimizers[stage.name]
      optim.log_table(state.params, table)
      if position.step <= stage.first_step:
        iterators = {task.name: iterator(stage)}
        state = state_lib.with_optimizer(state, tx, mesh)
        state = state.replace(aux=jax.jit(lambda: new_aux(stages), out_shardings=sharding.replicated(mesh))())
        if spec is not None:
          state = start_codebooks(state, model, spec, next(iterator(stage)), mesh)
      state = run_stage(config, stage, state, tx, iterators, mesh, model, spec, store, writer, evaluation)
      position = Position(stage.last_step, stage.name, True)

    banner("evaluation")
    trained = Model(config, state.params, state.codebooks, evaluation.trunks)
    untrained = Model(baseline_of(config), untrained_params, {}, evaluation.trunks)
    return evaluation.finish(trained, int(state.step), writer), {"before": untrained, "after": trained}


def run_stage(
  config: Any, stage: Stage, state: TrainState, tx: Any, iterators: Mapping[str, Any], mesh: Any, model: Any, spec: Any,
  store: Checkpoints, writer: MetricsWriter, evaluation: Evaluation,
) -> TrainState:
  """The loop of one stage, from wherever `state` stands to the stage's last step."""
  read = lambda: {name: sharding.put_batch(next(it), mesh) for name, it in iterators.items()}
  step, compiled = int(state.step), None
  clock = Throughput()
  bar = tqdm.tqdm(total=stage.last_step, initial=step, desc=stage.name, unit="step", disable=None, mininterval=0.5)
  while step < stage.last_step:
    with clock.waiting():
      batch = read()
    if compiled is None:
      train_step = make_train_step(model, spec, stage, tx, update=config.codebook.update_mode)
      compiled = compile_step(train_step, state, batch, mesh)
      clock.restart()
    state, metrics = compiled(state, batch)
    step += 1
    clock.add(stage.batch_size)
    bar.update()
    last = step == stage.last_step
    if step % config.log_steps == 0 or last:
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      check_finite(values, step, stage)
      warn_of_collapse(state.codebooks, config.codebook.alarm_share, step)
      writer.write(step, stage.name, values | clock.report())
    if step % config.eval_steps == 0 and not last:
      bar.clear()
      current = Model(config, state.params, state.codebooks, evaluation.trunks)
      writer.write(step, stage.name, evaluation.validate(current))
      clock.restart()
    if step % config.checkpoint_steps == 0 or last:
      writer.flush()
      store.save(Position(step, stage.name, last), state, iterators, config_lib.to_plain(config))
  bar.close()
  return state


def compile_step(step: Any, state: TrainState, batch: Any, mesh: Any) -> Any:
  """Compiles the step for these shapes once and for all (a later shape is an error, not a recompilation)."""
  started = time.time()
  jitted = jax.jit(step, donate_argnums=0, out_shardings=sharding.replicated(mesh))
  # XLA keeps to 256 bits on CPU unless told otherwise; the code search is twice as fast with the whole register.
  options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
  compiled = jitted.lower(state, batch).compile(compiler_options=options)
  memory = compiled.memory_analysis()
  logging.info(
    "compiled the step in %.1f s: %.0f MB of arguments, %.0f MB of temporaries a device", time.time() - started,
    memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20,
  )
  return compiled


def whiten_heads(params: Any, config: Any, tables: Mapping[str, Any]) -> Any:
  """The random start of the shared heads, with `config.model.towers.*.whiten` folded in where it is set."""
  params = dict(params)
  for name, tower in config.model.towers.items():
    if tower.whiten:
      tokens = np.asarray(tables[name].features[:, 0, 0], np.float32)
      head = whitened(jax.device_get(params[name]["shared"]), tokens, tower.whiten)
      placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), head, params[name]["shared"])
      params[name] = dict(params[name]) | {"shared": placed}
  return params


def start_codebooks(state: TrainState, model: Any, spec: Any, batch: Any, mesh: Any) -> TrainState:
  """k-means start, from all tokens of the first batch, of the codebooks that no earlier stage has filled."""

  def start(state: TrainState, tokens: Any, masks: Any) -> Any:
    features, _ = model.apply({"params": state.params}, tokens)
    rng = jax.random.fold_in(state.rng, 2**31 - 1)
    started = init_codebooks(rng, features, state.codebooks, spec, masks=masks)
    keep = lambda old, new: jax.tree.map(lambda a, b: jnp.where(old.initialised, a, b), old, new)
    return {name: keep(old, started[name]) for name, old in state.codebooks.items()}

  masks = batch["_mask"]
  batch = sharding.put_batch({"tokens": {name: batch[name] for name in masks}, "masks": masks}, mesh)
  jitted = jax.jit(start, out_shardings=sharding.replicated(mesh))
  return state.replace(codebooks=jitted(state, batch["tokens"], batch["masks"]))


def warn_of_collapse(codebooks: Mapping[str, Any], share: float, step: int) -> None:
  """Logs a warning for every codebook in use the perplexity of whose moving usage is under `share` of its size."""
  for name, book in codebooks.items():
    if book.initialised and collapsed(book.usage, share):
      perplexity = float(usage_stats(book.usage)["perplexity"])
      logging.warning("step %d: codebook %r collapses: perplexity %.1f of %d", step, name, perplexity, len(book.codes))


def check_finite(values: Mapping[str, float], step: int, stage: Stage) -> None:
  """Raises FloatingPointError naming the terms that are not finite."""
  bad = [name for name, value in values.items() if not abs(value) < float("inf")]
  if bad:
    raise FloatingPointError(f"stage {stage.name!r}, step {step}: not finite: {', '.join(bad)}")
