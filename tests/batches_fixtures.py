"""A toy data set, a digest of batches, and a look into the process that reads them. Worker processes import this."""

import hashlib
import os
import signal
import sys

import numpy as np
import threadpoolctl

from codebind_jax.data.batches import SourceBatches
from tests.source_fixtures import Rows, tokens_of

EXTRA = {"extra": 10, "extra_share": 0.3}  # of six rows two, of ten three


def toy():
  """Twenty rows of eight labels and two rows without, ten further rows of seven labels; captions, views, gaps."""
  count = 30
  views = np.arange(count * 3 * 2 * 4, dtype=np.float16).reshape(count, 3, 2, 4)
  texts = np.arange(50 * 5, dtype=np.float16).reshape(50, 1, 1, 5)
  image = tokens_of(views, [(i,) if i % 7 else () for i in range(count)], 0.5)
  text = tokens_of(texts, [tuple(range(i % 4, 50, 5 + i))[: i % 3 + 1] for i in range(count)])
  labels = [None if i % 9 == 4 else f"label{i % 8}" for i in range(20)] + [f"further{i % 7}" for i in range(10)]
  return Rows("toy", [{"label": label} for label in labels]), {"image": image, "text": text}


def toy_batches(rows, **options):
  return SourceBatches(*toy(), rows=rows, seed=3, **options)


def leaves(tree, path=""):
  """(path, array) of nested dicts, sorted."""
  for key in sorted(tree):
    below = f"{path}/{key}"
    yield from leaves(tree[key], below) if isinstance(tree[key], dict) else [(below, np.asarray(tree[key]))]


def digest(batches):
  """A hash of batches: their keys, types, shapes and bits."""
  found = hashlib.sha256()
  for batch in batches:
    for path, x in leaves(batch):
      found.update(f"{path} {x.dtype} {x.shape} ".encode() + x.tobytes())
  return found.hexdigest()[:16]


class Probe:
  """Tells where a batch was read."""

  def __init__(self, batches):
    self.batches = batches

  def __getitem__(self, step):
    batch = self.batches[step]
    if step == 13:
      os.kill(os.getpid(), signal.SIGTERM)  # a batch system tells all processes
    pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
    modules = [name for name in ("jax", "jaxlib", "torch", "tensorflow") if name in sys.modules]
    return {"step": step, "pid": os.getpid(), "modules": modules, "pools": pools, "batch": batch,
            "platform": os.environ.get("JAX_PLATFORMS")}  # fmt: skip


class Failing:
  """Cannot read the item of step 2; reads it by ending the process if told so."""

  def __init__(self, die=False):
    self.die = die

  def __getitem__(self, step):
    if step == 2:
      if self.die:
        os._exit(3)
      raise OSError("item 2 is gone")
    return step
