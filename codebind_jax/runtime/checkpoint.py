"""Checkpoints: train state, config, stage, the data's fingerprint and who wrote them; what is damaged is never used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from codebind_jax import files, schema
from codebind_jax.runtime.checkpoint_files import Damaged, kinds_of, note_version, said, this_version, versions_of
from codebind_jax.runtime.far_checkpoint import FarCheckpoints
from codebind_jax.runtime.near_checkpoint import NearCheckpoints

FOLDER = "checkpoints"
ARRAYS = ("params", "codebooks")  # of a state, what a model needs
_SECTIONS = ("position", "config", "fingerprint")


_POSITION = {"step": int, "stage": str, "done": bool, "trained": [str]}


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a run stands.

  Attributes:
    step: global, over all stages.
    stage: the current stage.
    done: whether that stage is finished.
    trained: modalities trained so far, by this run and those it started from.
  """

  step: int
  stage: str
  done: bool
  trained: Sequence[str] = ()


class SavedRun:
  """Reads a run's checkpoints, also while the run goes on, and changes nothing in its folder.

  The newest checkpoint is read; where it is damaged, the newest one that is not, which the log says.

  Near, they are Orbax's with checksums, see `near_checkpoint`; at gs:// and s3://, see `far_checkpoint`.
  """

  def __init__(self, workdir: str | files.Path, *, keep: int = 2):
    self.path = files.path(workdir) / FOLDER
    self._store = (FarCheckpoints if files.is_far(self.path) else NearCheckpoints)(self.path, keep=keep)

  def read(self, keys: Sequence[str] = ARRAYS) -> tuple[dict[str, Any], dict[str, Any]]:
    """(position, config and fingerprint; parts of the state as nested dicts of numpy arrays) of one checkpoint.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      Damaged: a ValueError that names the checkpoint, if all are damaged.
    """
    return self._newest(lambda step: (self._meta(step), self._store.arrays(step, keys)))

  def read_meta(self) -> dict[str, Any]:
    """Position, config and fingerprint; raises as `read`."""
    return self._newest(self._meta)

  def read_arrays(self, keys: Sequence[str] = ARRAYS) -> dict[str, Any]:
    """Parts of the state as nested dicts of numpy arrays; raises as `read`."""
    return self.read(keys)[1]

  def fingerprint(self) -> dict[str, Any] | None:
    """The data's fingerprint; None where no checkpoint can be read."""
    try:
      return self.read_meta()["fingerprint"]
    except (FileNotFoundError, Damaged):
      return None

  def _newest(self, read: Callable[[int], Any]) -> Any:
    """What `read` gives of the newest checkpoint that is not damaged."""
    damaged: dict[int, str] = {}
    while True:
      steps = self._store.steps()
      step = next((step for step in steps if step not in damaged), None)
      if step is None and damaged:
        newest = max(damaged)
        others = "".join(f"; nor can {self.path / str(step)}: {damaged[step]}" for step in sorted(damaged)[:-1])
        raise Damaged(f"checkpoint {self.path / str(newest)} cannot be read, it is damaged: {damaged[newest]}{others}")
      if step is None:
        aside = self._store.damaged()
        raise FileNotFoundError(f"no checkpoint in {self.path}" + (f", only {', '.join(aside)}" if aside else ""))
      try:
        self._store.verify_part(step)
        result = read(step)
      except Damaged as error:
        if step in self._store.steps():
          damaged[step] = str(error)
        continue
      except Exception as error:
        if step not in self._store.steps():  # the run has deleted it meanwhile
          continue
        damaged |= {step: reason} if (reason := self._damage(step)) else {}
        if reason:
          continue
        self._explain(step, error)
        raise
      for bad in sorted(damaged, reverse=True):
        logging.warning("checkpoint %s cannot be read, taking the one before it, %s: it is damaged: %s",
                        self.path / str(bad), self.path / str(step), damaged[bad])  # fmt: skip
      return result

  def _meta(self, step: int) -> dict[str, Any]:
    """What was saved with a checkpoint's arrays.

    Raises:
      ValueError: if another version wrote what this one does not read.
    """
    meta = self._store.meta(step)
    wrong = [key for key in _SECTIONS if not isinstance(meta, dict) or not isinstance(meta.get(key), dict)]
    if wrong:
      raise ValueError(f"checkpoint {self.path / str(step)} has no section {wrong[0]!r}{_by(meta)}")
    names = {field.name for field in dataclasses.fields(Position)}
    if names != meta["position"].keys():
      raise ValueError(f"checkpoint {self.path / str(step)} has a position of {sorted(meta['position'])}; allowed: "
                       f"{sorted(names)}{_by(meta)}")  # fmt: skip
    files.check_form(meta["position"], _POSITION, f"checkpoint {self.path / str(step)}: position")
    logging.debug("checkpoint %s%s", self.path / str(step), _by(meta))
    return meta

  def _damage(self, step: int) -> str:
    """What is damaged in a checkpoint that cannot be read; empty if nothing is."""
    try:
      self._store.verify(step)
    except Damaged as error:
      return str(error)
    return ""

  def _explain(self, step: int, error: Exception) -> None:
    """Says of a checkpoint that is whole, and cannot be read, which version wrote it."""
    if isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError):
      return  # the machine's
    try:
      by = _by(self._store.meta(step))
    except Exception as other:
      by = f" (nor can what was saved with it: {_first_line(other)})"
    logging.error("checkpoint %s is as it was written, and cannot be used: %s%s", self.path / str(step),
                  _first_line(error), by)  # fmt: skip

  def close(self) -> None:
    """Frees what reading and writing need; waits for the last save."""
    self._store.close()


class Checkpoints(SavedRun):
  """Those of the run that this process trains: writes `workdir/checkpoints/<step>`, keeps the newest `keep` of them.

  One run alone may have it, see `files.held`. Nothing is made or removed before `restore` or `save`.
  """

  def save(self, position: Position, state: Any, fingerprint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint.

    Args:
      position: says which batch comes next.
      state: after its step.
      fingerprint: of the data.
      config: of the run.

    Raises:
      RuntimeError: if another process has taken over the run's folder; for what went wrong with the save before.
    """
    files.check_held(self.path)
    meta = {"position": dataclasses.asdict(position), "config": dict(config), "fingerprint": dict(fingerprint),
            "written_by": dict(this_version())}  # fmt: skip
    done = lambda: note_version(self.path.parent, position.step)
    self._store.save(position.step, state, meta, done)

  def restore(self, target: Callable[[Position], Any]) -> tuple[Position, Any] | None:
    """Restores the newest checkpoint that is not damaged.

    Args:
      target: position -> abstract state; called per checkpoint tried.

    Returns:
      (position, state) or None for a run that never had a checkpoint. A damaged one, of which a file is missing or not
      what its checksum says, is set aside (near as `<step>.damaged`, far its `commit.json` as `damaged.json`), named in
      the log, and the one before it is tried. Whatever else goes wrong leaves all files where they are.

    Raises:
      RuntimeError: if there were checkpoints, but none that can be read is left.
      ValueError: if a checkpoint's arrays differ from the target's in path, shape or type, naming who wrote it.
    """
    self._store.clean()
    steps = self._store.agreed_steps()
    for step in steps:
      found = self._intact(step, lambda step=step: self._opened(step))
      if found is None:
        continue
      meta, saved = found
      position = Position(**meta["position"])
      state = target(position)
      if differing := schema.difference(saved, kinds_of(state)):
        raise ValueError(f"checkpoint {self.path / str(step)} holds other arrays than this run has "
                         f"({len(differing)} differ): {'; '.join(differing[:5])}{_by(meta)}")  # fmt: skip
      restored = self._intact(step, lambda step=step, state=state: self._store.restore(step, state))
      if restored is not None:
        return position, restored
    advice = ("put back a copy of one, or use another workdir; to begin again from the first step, remove "
              f"{self.path.parent}")  # fmt: skip
    if steps:
      raise RuntimeError(f"none of the checkpoints {steps} in {self.path} can be read; they are kept as *.damaged; "
                         f"{advice}")  # fmt: skip
    if aside := self._store.damaged():
      raise RuntimeError(f"{self.path} has no checkpoint but {', '.join(aside)}, which was set aside; {advice}")
    if versions := versions_of(self.path.parent):
      raise RuntimeError(f"{self.path} has no checkpoint, but {self.path.parent} is of a run that had one at step "
                         f"{versions[0]['step']}; {advice}")  # fmt: skip
    return None

  def _opened(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(what was saved with the arrays, path -> type and shape of each)."""
    self._store.verify_part(step)
    return self._meta(step), self._store.kinds(step)

  def _intact(self, step: int, read: Callable[[], Any]) -> Any:
    """What `read` gives; None where any process finds the checkpoint damaged, which is then set aside."""
    result, reason = None, ""
    try:
      result = read()
    except Damaged as error:
      reason = str(error)
    except Exception as error:
      reason = self._damage(step)
      if not reason:
        self._explain(step, error)
        raise
    if not self._store.agreed(bool(reason)):
      return result
    logging.error("checkpoint %s cannot be read, trying the one before it: %s", self.path / str(step),
                  reason or "another process finds it damaged")  # fmt: skip
    self._store.set_aside(step)
    return None

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    self._store.wait()


def _by(meta: Any) -> str:
  version = meta.get("written_by") if isinstance(meta, Mapping) else None
  same = version == this_version()
  return f" (written by {said(version)}, {'as is this' if same else f'this is {said(this_version())}'})"


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200] if str(error) else type(error).__name__

