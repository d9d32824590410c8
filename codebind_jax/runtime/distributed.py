"""Several processes that train one model: start, barriers, and work that process 0 does first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# After this silence a process counts as dead, and the others end with an error.
HEARTBEAT_SECONDS = 30


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins the other processes of this run, before any device is used.

  Settings come from the arguments (flags), else from the environment variables `JAX_COORDINATOR_ADDRESS`,
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else from TPU pods, SLURM or Open MPI. A single process needs none.

  Raises:
    ValueError: if only some of the three are given.
  """
  settings = {
    "coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "num_processes": _number(num_processes, "JAX_NUM_PROCESSES"),
    "process_id": _number(process_id, "JAX_PROCESS_ID"),
  }
  missing = [name for name, value in settings.items() if value is None]
  if len(missing) == 3 and not _on_a_cluster():
    return
  if missing and len(missing) < 3:
    raise ValueError(f"--{missing[0]}: not given; allowed: --coordinator, --num_processes and --process_id, or none")
  if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(*settings.values(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  logging.info("process %d of %d, %d of %d devices here", jax.process_index(), jax.process_count(),
               jax.local_device_count(), jax.device_count())


def _number(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  return int(text) if value is None and text else value


def _on_a_cluster() -> bool:
  """Whether the environment says that this process is one of several."""
  several = any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
  # JAX's import sets the first variable on a Cloud TPU VM, whose metadata names the other workers (its environment does
  # not); the second says that there is no metadata.
  tpu_vm = os.environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in os.environ
  pods = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
  return several or tpu_vm or pods


def wait_for_all(name: str) -> None:
  """Waits until every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
  """Process 0 runs the body before the others, which then find its results in the cache on a shared disk."""
  if jax.process_index() > 0:
    wait_for_all("after the first")
  yield
  if jax.process_index() == 0:
    wait_for_all("after the first")


def interleaved(own: np.ndarray, count: int, processes: int) -> np.ndarray:
  """Rows that every process has a part of, in order: process p of P gives rows p, p + P, ...

  Args:
    own: this process's rows, [m, ...] of at most 64-bit numbers.
    count: of all rows.
    processes: P, all or this one alone.
  """
  if processes == 1:
    return own
  padded = np.zeros((-(-count // processes), *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  # Bytes, since JAX would cut 64-bit numbers to 32.
  gathered = np.asarray(multihost_utils.process_allgather(padded.view(np.uint8)))
  whole = gathered.reshape(processes, *padded.view(np.uint8).shape).view(own.dtype)
  return np.swapaxes(whole, 0, 1).reshape(-1, *own.shape[1:])[:count]


def agreed(value: bool) -> bool:
  """The value that process 0 gives."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))
