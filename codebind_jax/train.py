"""A training run, `train_and_evaluate`: data, model, stages, evaluation, report; it can be killed and continued."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jaxtyping import Bool, Float

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.api import Model, config_of
from codebind_jax.codebook import collapsed, usage_stats
from codebind_jax.command_line import bind
from codebind_jax.config import Config, validation
from codebind_jax.data.batches import Batches, Once, SourceBatches, check_rows
from codebind_jax.data.examples import Feed, Tokens
from codebind_jax.data.task import Task, open_task
from codebind_jax.evaluate import Evaluation, StageEvaluation
from codebind_jax.initialise import check_start, copy_heads, load_published, start_from, whiten_heads
from codebind_jax.methods.base import EXTRA, Method, make_init
from codebind_jax.report import summary
from codebind_jax.report.page import write_report
from codebind_jax.runtime import agreement, checkpoint, distributed, optim, signals
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.checkpoint import Checkpoints, Position, SavedRun
from codebind_jax.runtime.compile import Programs, compile_step
from codebind_jax.runtime.guard import BadRecords, Watch
from codebind_jax.runtime.metrics import FILE, MetricsWriter, Phases, Throughput, input_bound, read_metrics
from codebind_jax.runtime.sharding import Layout, make_layout
from codebind_jax.runtime.signals import Preempted
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage
from codebind_jax.step import make_start_codebooks, make_start_features, make_train_step
from codebind_jax.trunks import frozen_by, input_shapes
from codebind_jax.trunks.feeds import Feeder

# Config keys on which no compiled function depends, and the one on which only the training step depends.
UNUSED, RATE = ("seed", "test", "init_from"), "optim.learning_rate"
# Config keys that change no parameter, so that a run may be continued with other values; `steps` may grow.
FREE = (
  "data.workers", "data.threads", "data.checked", "data.max_bad_records", "log_steps", "eval_steps", "checkpoint_steps",
  "keep_checkpoints", "baseline",
)  # fmt: skip
WAITED = 10.0  # seconds that a stage waited for data, below which no advice is worth a line


def banner(text: str) -> None:
  """Logs which part of the run begins."""
  logging.info("---- %s ----", text)


def open_run(config: Config, workdir: str | files.Path, *, strict: bool = False) -> files.Path:
  """Creates the run's folder with its config.json, or checks that the folder holds a run of the same config.

  A folder in which no step was made takes any config. Keys that change no parameter may differ (`FREE`), and the last
  stage may have more steps than before.

  Args:
    config: of the run.
    workdir: its folder.
    strict: refuses every difference, also before the first step.

  Raises:
    ValueError: if the folder holds a run of another config, naming every key that differs; as `run_folder`.
    OSError: if it cannot be written.
  """
  validation.check_folder(config, workdir)
  folder = run_folder(workdir)
  path, plain, earlier = folder / "config.json", schema.to_plain(config), None
  if files.is_file(path) and (strict or steps_made(folder)):
    earlier = schema.to_plain(read_config(folder))
    changed = [line for line in schema.difference(earlier, plain) if strict or not _harmless(line, earlier, plain)]
    if changed:
      raise ValueError(
        f"workdir {str(folder)!r} holds a run of another config: {'; '.join(changed)}; use another one (to start from "
        f"this run's parameters, with --config.init_from={folder})"
      )
    if _steps(plain) > _steps(earlier):
      logging.info("%s goes on to %d steps, %d before; the learning rate follows the longer schedule from here on",
                   folder, _steps(plain), _steps(earlier))  # fmt: skip
  if jax.process_index() == 0 and plain != earlier:
    files.write_sealed(path, plain)
  return folder


def read_config(folder: files.Path) -> Config:
  """The config of the run in a folder, from its config.json, which carries a checksum; one written by hand need not.

  Raises:
    ValueError: naming the file, if it is damaged or has another config's keys.
  """
  path = folder / "config.json"
  content = files.read_sealed(path, need=False)
  try:
    return config_lib.read_saved(content)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def run_folder(workdir: str | files.Path) -> files.Path:
  """A run's folder, which is made where it is not there.

  Raises:
    ValueError: for a name that logs and reports cannot hold, an address that is none, or a far disk that cannot be
      used.
    OSError: if it cannot be made.
  """
  folder = files.path(workdir)
  try:
    wrong = [one for one in str(folder) if ord(one) < 32 or ord(one) == 127]
    str(folder).encode()
  except UnicodeEncodeError as error:
    wrong = [str(folder)[error.start]]
  if wrong:
    raise ValueError(f"workdir {str(folder)!r} has {wrong[0]!r} in its name; allowed: UTF-8 without control characters")
  files.probe(folder, write=True)
  files.make_folder(folder)
  return folder


def steps_made(folder: files.Path) -> bool:
  """Whether a run's folder has metrics or a checkpoint, be it a damaged one."""
  has_lines = files.is_file(folder / FILE) and bool(read_metrics(folder))
  return has_lines or files.is_folder(folder / checkpoint.FOLDER) and bool(files.children(folder / checkpoint.FOLDER))


def _steps(plain: Mapping[str, Any]) -> int:
  return sum(plain["stages"][name]["steps"] for name in plain["stage_order"])


def _harmless(line: str, earlier: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
  """Whether a line of `schema.difference` names a key that may change in a run."""
  path = line.partition(":")[0]
  if path == "steps":  # the stages have their own
    return True
  last = (plain["stage_order"] or [""])[-1]
  return path in FREE or path == f"stages.{last}.steps" and _steps(plain) > _steps(earlier)


def baseline_of(config: Config) -> Config:
  """The config of the hard-alignment baseline: same towers, data and steps, plain InfoNCE, no codebooks."""
  losses, start = schema.Frozen({"info_nce": 1.0}), config.init_from
  if start and config_of(start).model.quantize:  # a run without codes is a baseline itself
    start = f"{start.rstrip('/')}/baseline"
  return dataclasses.replace(
    config, baseline=False, init_from=start,
    method="codebind", method_options=schema.Frozen(), model=dataclasses.replace(config.model, quantize=False),
    stages=schema.Frozen({name: dataclasses.replace(s, losses=losses) for name, s in config.stages.items()}),
  )  # fmt: skip


def train_and_evaluate(config: Any, workdir: str | files.Path) -> dict[str, float]:
  """Trains all stages of a config, evaluates, and writes metrics, checkpoints and the report into `workdir`.

  A run that the folder already holds is continued; if it is finished, only the report is written again.

  Args:
    config: of the run (ConfigDict, dict or `Config`).
    workdir: its folder.

  Returns:
    The final metrics by name; the baseline's under `baseline/...`.

  Raises:
    ValueError: for a bad config, a workdir of another run, or one that another process trains in, before any work.
  """
  if not bind.is_open(config):
    config = validation.validate(config)
    validation.check_folder(config, workdir)
  first = jax.process_index() == 0  # the others wait for it before they write
  with files.held(run_folder(workdir), "trains") if first else contextlib.nullcontext():
    return _train_and_evaluate(config, workdir)


def _train_and_evaluate(config: Any, workdir: str | files.Path) -> dict[str, float]:
  """That of a valid or open config, in a folder that this process holds."""
  phases = Phases()
  chosen_by_data = bind.is_open(config)
  if not chosen_by_data:
    folder = open_run(config, workdir)

  banner("data")
  # Worlds are fetched and built, and published trunks fetched, where they are not there yet.
  with phases("data"), distributed.process_0_first():
    if chosen_by_data:
      config, task = bind.opened(config)
      folder = open_run(config, workdir)
    if config.init_from:
      check_start(config)
    if not chosen_by_data:
      task = open_task(config.data)
    check_data(config, task)
    feeder = Feeder(config.data, config.model.towers)
  with phases("data"):
    agreement.check("config", config)
    agreement.check_sources({**task.drawn, **{test.name: test.source for test in task.evals}})
  with phases("features"):
    feeds = feeder.train_feeds(task.drawn, config.data.templates_of)
  evaluation = Evaluation(config, task, feeder, config.tasks)
  evaluation.log_unread()

  with phases("model"):
    final, models = run_stages(config, folder, feeds, evaluation, phases=phases)
  if config.baseline:
    banner("baseline: the same heads by plain InfoNCE, without codebooks")
    plain = baseline_of(config)
    inner = open_run(plain, folder / "baseline")
    with phases("baseline"):
      baseline, plain_models = run_stages(plain, inner, feeds, Evaluation(plain, task, feeder, config.tasks))
    final |= {f"baseline/{name}": value for name, value in baseline.items()}
    models["baseline"] = plain_models["after"]

  if jax.process_index() == 0:
    banner("report")
    evaluation.alone()
    with phases("report"):
      data = summary.report_data(config, folder, task, evaluation, final, models)
    write_report(folder / "report.html", dataclasses.replace(data, seconds=phases.seconds))
    sys.stdout.write(summary.text_table(data) + f"\nreport: {folder / 'report.html'}\n")
  return final


def check_data(config: Config, task: Task) -> None:
  """Checks the data against towers, stages and batch, before encoders are fetched and tokens computed.

  Raises:
    ValueError: naming the key to set, or what the data lacks.
  """
  if not task.train or not all(map(len, task.train.values())):
    raise ValueError("config.data: there are no training records (split 'train')")
  modalities = {name: set(source.modalities) & set(config.model.towers) for name, source in task.train.items()}
  for stage in config.ordered:
    used = {m for name in (stage.sources or modalities) for m in modalities.get(name, ())}
    if absent := [m for m in stage.modalities if m not in used]:
      there = ", ".join(f"{name}: {', '.join(source.modalities)}" for name, source in task.train.items())
      raise ValueError(f"config.stages.{stage.name}.pairs: no training record has {absent[0]!r}; the data has {there}")
    for name, rows in stage.on(modalities).sources.items():
      drawn = task.drawn[name]
      check_rows(drawn.index.group, rows, unique_labels=stage.unique_labels, extra=len(drawn) - len(task.train[name]),
                 extra_share=config.data.extra, name=name, processes=jax.process_count())  # fmt: skip


def run_stages(
  config: Config, folder: files.Path, feeds: Mapping[str, Mapping[str, Feed]], evaluation: StageEvaluation,
  programs: Programs | None = None, make_batches: Callable[..., Batches] | None = None, phases: Phases | None = None,
) -> tuple[dict[str, float], dict[str, Model]]:
  """Runs or continues the stages of one config.

  Args:
    config: of the run.
    folder: its folder.
    feeds: source -> modality -> what the training items are read from.
    evaluation: of this config and its task.
    programs: compiled functions of earlier runs on the same data, to be used again.
    make_batches: gives the same batches as `batches_of`, the default, for the same arguments.
    phases: counts the time.

  Returns:
    The final metrics (empty on other processes than 0), and the models "before" and "after" training.

  Raises:
    ValueError: if the run in the folder was trained on other data, before anything of it is changed.
  """
  phases = phases or Phases()
  stages = [stage.on({name: set(modalities) for name, modalities in feeds.items()}) for stage in config.ordered]
  batches = {s.name: (make_batches or batches_of)(config, s, feeds, evaluation.task) for s in stages}
  fingerprint = {name: of_stage.fingerprint for name, of_stage in batches.items()}
  agreement.check("stage", fingerprint)
  with contextlib.closing(SavedRun(folder)) as earlier_run:
    changed = schema.difference(earlier_run.fingerprint() or fingerprint, fingerprint)
  if changed:
    raise ValueError(f"the run in {str(folder)!r} was trained on other data (stage.source.what: then -> now): "
                     f"{'; '.join(changed)}; go on with the data it began with, or use another workdir (with "
                     f"--config.init_from={folder} to start from this run's parameters)")  # fmt: skip
  banner("model")
  for name, (shared, whole) in config.item_bytes.items():
    logging.info("%s: the codes of an item take %d bytes, of its shared part %d", name, whole, shared)
  programs = programs or Programs()
  layout = make_layout(config.mesh, config.sharding)
  method = config_lib.method_of(config)
  first_feed = {m: feed for by_modality in reversed(feeds.values()) for m, feed in by_modality.items()}
  shapes = input_shapes(config.model, evaluation.trunks)
  create = lambda: state_lib.creator(layout, make_init(method, shapes, config.model.half, stages))
  state = programs.get("create", schema.key(config, *UNUSED, RATE), create)(jax.random.key(config.seed))
  state = state.replace(params=load_published(state.params, config.model, evaluation.trunks))
  state = state.replace(params=whiten_heads(state.params, config.model.towers, first_feed, layout))
  earlier: tuple[str, ...] = ()
  if config.init_from:
    state, earlier = start_from(state, config.init_from)
  new, trained = {}, {}  # stage -> modalities that it is the first to train, and those trained by its end
  for stage in stages:
    new[stage.name] = {*stage.modalities} - {*earlier}
    trained[stage.name] = earlier = tuple(dict.fromkeys((*earlier, *stage.modalities)))
  untrained_params = jax.device_get(layout.gathered(state.params))  # the step donates its state
  optimizers = {stage.name: optimizer_of(config, method, stage, state.params) for stage in stages}

  with contextlib.closing(Checkpoints(folder, keep=config.keep_checkpoints)) as store, MetricsWriter(
    folder, active=jax.process_index() == 0
  ) as writer:
    restored = store.restore(lambda at: state_lib.abstract(state, optimizers[at.stage][0], layout))
    position = Position(0, stages[0].name, False)  # until something is restored
    if restored is None:
      need = 2 * sum(x.nbytes for x in jax.tree.leaves(state)) * config.keep_checkpoints  # with the optimizer's moments
      files.check_space(folder, need, f"{config.keep_checkpoints} checkpoints (config.keep_checkpoints)")
      logging.info("no checkpoint yet: training begins")
    else:
      position, state = restored
      logging.info("continuing from step %d of stage %r", position.step, position.stage)
    writer.truncate(position.step)

    for stage in stages:
      if stage.last_step < position.step:
        continue
      if stage.last_step == position.step:
        evaluate_stage(config, state, stage, stages, evaluation, writer, trained[stage.name], layout)
        continue
      banner(f"stage {stage.name}: {stage.steps} steps on {' + '.join(stage.modalities)}")
      tx, table = optimizers[stage.name]
      optim.log_table(state.params, table)
      if position.step <= stage.first_step:
        state = state.replace(params=copy_heads(state.params, config.model.towers, new[stage.name]))
        make = functools.partial(state_lib.optimizer_init, state.params, tx, layout)
        optimizer_init = programs.get(f"optimizer {stage.name}", schema.key(config, *UNUSED, RATE), make)
        state = state.replace(opt_state=optimizer_init(state.params))
        layout.log(state)
        if state.codebooks and method.start_rows:
          with phases("data"):
            rows = {name: len(source) for name, source in evaluation.task.train.items()}
            state = start_from_rows(method, state, stage, feeds, rows, config.seed, layout)
        elif state.codebooks:
          placed = layout.of(state.codebooks, "codebooks")
          make = functools.partial(jax.jit, make_start_codebooks(method), out_shardings=placed)
          start_codebooks = programs.get(f"start {stage.name}", schema.key(config, *UNUSED, RATE), make)
          state = state.replace(codebooks=start_codebooks(state, layout.put_batch(batches[stage.name][0])))
      compile_for = lambda state, batch, stage=stage, tx=tx, table=table: programs.get(
        f"step {stage.name}", schema.key(config, *UNUSED),
        lambda: compile_step(
          state_lib.guarded(make_train_step(method, stage, tx, frozen=optim.frozen(table))), state, batch, layout
        ),
      )
      with phases(f"stage {stage.name}"):
        state = run_stage(
          config, stage, state, compile_for, batches[stage.name], fingerprint, layout, store, writer, evaluation,
          trained[stage.name], worlds_until(stages, stage), phases,
        )
      position = Position(stage.last_step, stage.name, True)
      with phases("evaluation"):
        evaluate_stage(config, state, stage, stages, evaluation, writer, trained[stage.name], layout)
      close_files(evaluation.task, feeds)

    banner("evaluation")
    all_trained = trained[stages[-1].name]
    with phases("evaluation"):
      final = evaluation.finish(model_of(config, state, evaluation, all_trained, layout), int(state.step), writer)
      distributed.wait_for_all("evaluation")
    after = Model(config, *layout.gathered((state.params, state.codebooks)), evaluation.trunks, modalities=all_trained)
    start = dataclasses.replace(config, init_from="")
    before = Model(baseline_of(start), untrained_params, {}, evaluation.trunks, modalities=all_trained)
    return final, {"before": before, "after": after}


def start_from_rows(
  method: Method, state: TrainState, stage: Stage, feeds: Mapping[str, Mapping[str, Feed]], rows: Mapping[str, int],
  seed: int, layout: Layout,
) -> TrainState:
  """The state with codebooks, and rotations, that start from the features of `method.start_rows` training rows.

  Rows are drawn from the stage's sources, equally many of each. What counts is what an index would hold: the clean view
  of every item and the first text, each distinct one once; they are whole on every process.

  Args:
    method: of the run.
    state: at the stage's start.
    stage: which begins.
    feeds: source -> modality -> what the training items are read from.
    rows: source -> number of its training rows.
    seed: of the draw.
    layout: mesh and rules.
  """
  features_of = jax.jit(make_start_features(method), out_shardings=layout.replicated)
  found: dict[str, list[Any]] = {}
  share = -(-method.start_rows // len(stage.sources))
  for number, (name, size) in enumerate(stage.sources.items()):
    drawn = np.random.default_rng((seed, number)).permutation(rows[name])[:share]
    items = {m: Once(feed, drawn, size, *layout.process) for m, feed in feeds[name].items() if m in stage.modalities}
    for batch in range(-(-len(drawn) // size)):
      parts = {m: once[batch] for m, once in items.items()}
      for m, part in parts.items():
        for row, message in part.bad:
          logging.warning("left out of the start of the codebooks: row %d of %s, %s: %s", row, name, m, message)
      made = {m: part.items for m, part in parts.items()} | {"_mask": {m: part.good for m, part in parts.items()}}
      features, masks = jax.tree.map(
        np.asarray, layout.gathered(features_of(state.params, layout.put_batch({name: made})))
      )
      for m, x in features.items():
        found.setdefault(m, []).append((x, masks[m]))
      logging.log_every_n_seconds(logging.INFO, "start of the codebooks: %d rows of %s", 20, batch * size, name)
  columns = {name: [np.concatenate(column) for column in zip(*parts)] for name, parts in found.items()}
  columns = {name: (x, mask & _first_of_equals(x)) for name, (x, mask) in columns.items()}
  begin = jax.jit(
    lambda *of, rng: method.start(*of, jax.random.fold_in(rng, 2**31 - 1)), out_shardings=layout.replicated
  )
  own = state.params.get(EXTRA, {})
  extra, codebooks = begin(
    layout.gathered(own), layout.gathered(state.codebooks), {m: x for m, (x, _) in columns.items()},
    {m: mask for m, (_, mask) in columns.items()}, rng=state.rng,
  )  # fmt: skip
  place = lambda new, old: jax.tree.map(lambda a, b: jax.device_put(np.asarray(a), b.sharding), new, old)
  logging.info("codebooks start from %s", ", ".join(f"{mask.sum()} of {m}" for m, (_, mask) in columns.items()))
  params = state.params | ({EXTRA: place(extra, own)} if own else {})
  return state.replace(params=params, codebooks=place(codebooks, state.codebooks))


def _first_of_equals(x: Float[np.ndarray, "n ..."]) -> Bool[np.ndarray, "n"]:
  """True for rows that equal no row before them."""
  first: dict[bytes, int] = {}
  return np.array([first.setdefault(row.tobytes(), n) == n for n, row in enumerate(x)], bool)


def close_files(task: Task, feeds: Mapping[str, Mapping[str, Feed]]) -> None:
  """Closes the files that a stage has opened, of sources and cached tokens; a later read opens them anew."""
  task.close()
  for feed in (feed for by_modality in feeds.values() for feed in by_modality.values()):
    if isinstance(feed, Tokens):
      feed.reader.close()


def optimizer_of(config: Config, method: Method, stage: Stage, params: Any) -> tuple[Any, dict[str, str]]:
  """A stage's optimizer and the table of its parameters, see `optim.make_optimizer`."""
  settings = config.optim
  if stage.learning_rate:
    settings = dataclasses.replace(settings, learning_rate=stage.learning_rate)
  frozen = (*method.frozen_paths(stage), *frozen_by(config.model, stage))
  trained = (*stage.train, *method.trained_paths(stage))
  return optim.make_optimizer(params, trained, settings, stage.steps, frozen=frozen)


def batches_of(
  config: Config, stage: Stage, feeds: Mapping[str, Mapping[str, Feed]], task: Task, keep: bool = False
) -> Batches:
  """A stage's batches; the arguments are those of `run_stages` and `Batches`."""
  drawn = task.drawn
  return Batches({
    name: SourceBatches(
      drawn[name], {m: feed for m, feed in feeds[name].items() if m in stage.modalities}, rows=rows,
      seed=config.seed, unique_labels=stage.unique_labels, extra=len(drawn[name]) - len(task.train[name]),
      extra_share=config.data.extra, name=name, process=jax.process_index(), processes=jax.process_count(),
    )
    for name, rows in stage.sources.items()
  }, keep)  # fmt: skip


def evaluate_stage(
  config: Config, state: TrainState, stage: Stage, stages: Sequence[Stage], evaluation: StageEvaluation,
  writer: MetricsWriter, trained: Sequence[str], layout: Layout,
) -> None:
  """Evaluates all modalities trained so far at a stage's end; the final evaluation does so after the last stage."""
  if stage is not stages[-1]:
    model = model_of(config, state, evaluation, trained, layout)
    evaluation.after_stage(model, stage.last_step, stage.name, writer, worlds_until(stages, stage))


def model_of(
  config: Config, state: TrainState, evaluation: StageEvaluation, trained: Sequence[str], layout: Layout
) -> Model:
  """The model of a state, on the run's own devices."""
  return Model(config, state.params, state.codebooks, evaluation.trunks, modalities=trained, layout=layout)


def worlds_until(stages: Sequence[Stage], stage: Stage) -> set[str]:
  """Sources of all stages up to this one."""
  return {name for one in stages[: stages.index(stage) + 1] for name in one.sources}


def run_stage(
  config: Config, stage: Stage, state: TrainState, compile_for: Callable[[TrainState, Any], Any],
  batches: Batches, fingerprint: Mapping[str, Any], layout: Layout, store: Checkpoints, writer: MetricsWriter,
  evaluation: StageEvaluation, trained: Sequence[str], worlds: Collection[str], phases: Phases,
) -> TrainState:
  """Trains one stage from the step of `state` to its last, with the step function that `compile_for` gives.

  Raises:
    Preempted: if the process was told to end; the state is saved.
  """
  step, compiled, advised = int(state.step), None, False
  read = lambda at: layout.put_batch(batches[at - stage.first_step])

  def save(store: Checkpoints, at: int, state: TrainState) -> None:
    position = Position(at, stage.name, at == stage.last_step, tuple(trained))
    store.save(position, state, fingerprint, schema.to_plain(config))

  def validate() -> None:
    with phases("evaluation"):
      found = evaluation.validate(model_of(config, state, evaluation, trained, layout), worlds)
    writer.write(step, stage.name, found)
    distributed.wait_for_all("validation")  # process 0 alone measures, and no collective waits as long

  clock, watch, bad = Throughput(), Watch(store.path.parent, stage.name, step), BadRecords(config.data.max_bad_records)
  bar = tqdm.tqdm(total=stage.last_step, initial=step, desc=stage.name, unit="step", disable=None, mininterval=0.5)
  ahead = batches.start(step - stage.first_step, workers=config.data.workers, threads=config.data.threads)
  # A run that was told to end while it validated does so as it goes on.
  if step > stage.first_step and step % config.eval_steps == 0 and not validated(writer, stage, step):
    validate()
  with contextlib.closing(ahead), contextlib.ExitStack() as unsaved:
    while step < stage.last_step:
      with clock.waiting(state.step):
        examples = next(ahead)
        batch = layout.put_batch(examples.batch)
      clock.read({name: len(rows["_row"]) for name, rows in examples.batch.items()}, examples.read, examples.seconds)
      for item in examples.bad:
        bad.add(item.source, item.row, item.modality, item.message)
      if compiled is None:
        with phases("compile"):
          compiled = compile_for(state, batch)
          distributed.wait_for_all(f"compiled {stage.name}")
        unsaved.enter_context(signals.saving())
        clock.restart()
      state, metrics = compiled(state, batch)
      step += 1
      clock.add(sum(stage.sources.values()))
      bar.update()
      last = step == stage.last_step
      stop = signals.reached() and not last
      due = step % config.checkpoint_steps == 0 or last or stop
      if due or step % config.log_steps == 0:
        watch.check(state, step, compiled, read, save)
        bad.check()
      if step % config.log_steps == 0 or last:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        warn_of_collapse(state.codebooks, config.codebook.alarm_share, step)
        values["compiled_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        rates = clock.report()
        writer.write(step, stage.name, values | rates)
        log_progress(stage, step, values["train/total"], rates["examples_per_second"])
        advice = input_bound(rates, config.data.workers, config.data.threads) if clock.waited > WAITED else ""
        if advice and not advised:  # once a stage
          logging.warning("%s", advice)
        advised |= bool(advice)
      if step % config.eval_steps == 0 and not (last or stop):
        bar.clear()
        try:
          validate()
        except Preempted:
          stop = True
        clock.restart()
      if stop and not due:  # told during the validation
        watch.check(state, step, compiled, read, save)
      if due or stop:
        writer.flush()
        save(store, step, state)
      if stop or last:
        store.wait()  # before the evaluation, which may end at once
      if stop:
        raise Preempted(f"stopped after step {step} of stage {stage.name!r}, state saved; the same command goes on")
  bar.close()
  return state


def validated(writer: MetricsWriter, stage: Stage, step: int) -> bool:
  """Whether the metrics hold a validation after that step; the same on all processes."""
  lines = read_metrics(writer.path) if files.is_file(writer.path) else []
  of_step = (line for line in lines if line["step"] == step and line["stage"] == stage.name)
  return distributed.agreed(any("train/total" not in line for line in of_step))


def log_progress(stage: Stage, step: int, loss: float, speed: float) -> None:
  """Logs a line of progress where no terminal shows a bar."""
  if not sys.stderr.isatty():
    left = (stage.last_step - step) * sum(stage.sources.values()) / max(speed, 1e-9)
    logging.info("%s: step %d of %d, loss %.4f, %.1f rows/s, %s left", stage.name, step, stage.last_step, loss, speed,
                 datetime.timedelta(seconds=round(left)))  # fmt: skip


def warn_of_collapse(codebooks: Mapping[str, Any], share: float, step: int) -> None:
  """Warns of every initialised codebook whose moving usage has a perplexity below `share` of its size."""
  for name, book in codebooks.items():
    if book.initialised and collapsed(book.usage, share):
      perplexity = float(usage_stats(book.usage)["perplexity"])
      logging.warning("step %d: codebook %r collapses: perplexity %.1f of %d", step, name, perplexity, book.usage.size)
