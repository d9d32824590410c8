"""Examples a second of JPEG and caption from tars, decoded and resized to 224: against open_clip, and a bare loop.

Run: python -m benchmarks.input [--torch=PYTHON]   (PYTHON has open_clip_torch[training]; "" leaves open_clip out)
Every contender has as many worker processes, and is stopped while another one is timed; the tars are in memory.
open_clip is its training script's own reader, `get_wds_dataset`, with CLIP's evaluation transform: as it is (float32,
normalised), and with uint8 pixels as ours. The bare loop reads at known offsets, decodes, resizes, hands on nothing.
"""

import io
import json
import multiprocessing
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks import machine

_TORCH = flags.DEFINE_string("torch", "", "Python that has open_clip_torch[training].")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds, after one that is not.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Worker processes of each contender.")
_IMAGES = flags.DEFINE_integer("images", 2048, "Images in all tars.")
_BATCH = flags.DEFINE_integer("batch", 256, "Rows of a batch.")
_TIMED = flags.DEFINE_integer("timed", 8, "Batches of a round.")
_TARS = 8

_PEER = """
import argparse, glob, json, sys, time
import open_clip, torchvision
from open_clip_train.data import get_wds_dataset
folder, workers, batch, timed, warm, kind = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
transform = open_clip.transform.image_transform(224, is_train=False)
if kind == "uint8":
  transform = torchvision.transforms.Compose([*transform.transforms[:-2], torchvision.transforms.PILToTensor()])
tars = sorted(glob.glob(folder + "/*.tar"))
args = argparse.Namespace(train_data="::".join(tars), train_data_upsampling_factors=None, dataset_resampled=False,
                          train_num_samples=10**9, seed=0, batch_size=batch, workers=workers, world_size=1)
found = iter(get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader)
for line in sys.stdin:
  for _ in range(warm):
    images, texts = next(found)
  start = time.perf_counter()
  for _ in range(timed):
    images, texts = next(found)
    assert images.shape == (batch, 3, 224, 224) and texts.shape == (batch, 77)
  print(json.dumps([time.perf_counter() - start, batch * (warm + timed)]), flush=True)
"""


def photo(rng):
  """A synthetic photo, the shorter side 256 pixels: light that changes slowly, edges, texture, noise."""
  size = (256, int(rng.integers(256, 385)))[:: rng.choice([1, -1])]
  total = np.zeros((size[1], size[0], 3), np.float32)
  for cells, weight in ((3, 90), (12, 45), (48, 22), (128, 11)):
    grid = rng.normal(size=(cells, cells, 3)) * 40 + 128
    layer = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize(size, rng.choice([0, 3]))
    total += (np.asarray(layer, np.float32) - 128) * (weight / 60)
  total += rng.normal(size=total.shape[:2])[..., None] * 4
  return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def make_tars(folder, count):
  """Writes the tars; returns the bytes of an image."""
  rng, size = np.random.default_rng(0), 0
  words = np.array("a photo of red blue small large cow dog boat tree house sun owl road with on the".split())
  for shard in range(_TARS):
    with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
      for number in range(shard, count, _TARS):
        buffer = io.BytesIO()
        photo(rng).save(buffer, "JPEG", quality=90)
        size += len(buffer.getvalue())
        for ending, content in (("jpg", buffer.getvalue()), ("txt", " ".join(rng.choice(words, 9)).encode())):
          info = tarfile.TarInfo(f"{number:06d}.{ending}")
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  return size / count


def batches_of(folder, rows):
  """This package's batches of the tars."""
  from codebind_jax.data.batches import Batches, SourceBatches
  from codebind_jax.data.examples import Items, Texts
  from codebind_jax.data.opening import open_source
  from codebind_jax.data.preparation.pictures import Picture, picture_input
  from codebind_jax.data.preparation.texts import clip_ids, text_input

  source = open_source(f"{folder}/*.tar", data_dir=folder)
  picture = picture_input(Picture((224, 224), crop="even"))
  feeds = {"image": Items(source, "image", picture), "text": Texts(source, text_input(clip_ids()))}
  return Batches({"tar": SourceBatches(source, feeds, rows=rows, seed=0, name="tar")})


def own(folder, workers, rows, timed, warm):
  """The contender of this package."""
  batches = batches_of(folder, rows).start(workers=workers)
  for _ in sys.stdin:
    for _ in range(warm):
      next(batches)
    start = time.perf_counter()
    for _ in range(timed):
      part = next(batches).batch["tar"]
      assert part["image"].shape == (rows, 224, 224, 3) and part["text"].shape == (rows, 77)
      assert part["_mask"]["image"].all()
    print(json.dumps([time.perf_counter() - start, rows * (warm + timed)]), flush=True)
  batches.close()


def bare_share(jobs, results, members):
  """A process of the bare loop: reads, decodes, resizes and crops as many as it is told."""
  handles, at = {}, 0
  for count in iter(jobs.get, None):
    for _ in range(count):
      path, offset, size = members[at]
      at = (at + 1) % len(members)
      if path not in handles:
        handles[path] = os.open(path, os.O_RDONLY)
      with Image.open(io.BytesIO(os.pread(handles[path], size, offset))) as image:
        short, long = min(image.size), max(image.size)
        new = (224, int(224 * long / short))
        image = image.resize(new if image.size[0] <= image.size[1] else new[::-1], Image.Resampling.BICUBIC)
      left, top = round((image.size[0] - 224) / 2), round((image.size[1] - 224) / 2)
      np.asarray(image.crop((left, top, left + 224, top + 224)))
    results.put(None)


def bare(folder, workers, rows, timed, _):
  """The limit: as many processes, that share nothing and hand on nothing."""
  members = []
  for path in sorted(pathlib.Path(folder).glob("*.tar")):
    with tarfile.open(path) as tar:
      members += [(str(path), info.offset_data, info.size) for info in tar if info.name.endswith(".jpg")]
  members = [members[n] for n in np.random.default_rng(0).permutation(len(members))]
  context = multiprocessing.get_context("spawn")
  jobs, results = [context.Queue() for _ in range(workers)], context.Queue()
  for number, queue in enumerate(jobs):
    context.Process(target=bare_share, args=(queue, results, members[number::workers]), daemon=True).start()
  for _ in sys.stdin:
    start = time.perf_counter()
    for queue in jobs:
      queue.put(rows * timed // workers)
    for _ in jobs:
      results.get()
    print(json.dumps([time.perf_counter() - start, rows * timed]), flush=True)
  for queue in jobs:
    queue.put(None)


def processor(session):
  """Processor seconds of all processes of a session that run."""
  ticks = 0
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[3]) == session:
      ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK")


def rates(commands, rounds, examples):
  """{name: [(examples a second, processor milliseconds an example) of each round]}.

  The servers are timed in turn and stopped in between. Processor time, what is read ahead included, hardly depends on
  what else runs on the machine.
  """
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
  servers = {name: subprocess.Popen(line, **pipes) for name, line in commands.items()}
  found = {name: [] for name in servers}
  try:
    _timed(servers, rounds, examples, found)
  finally:
    for server in servers.values():
      os.killpg(server.pid, signal.SIGCONT)
      server.stdin.close()
      try:
        server.wait(60)
      except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
  return found


def _timed(servers, rounds, examples, found):
  for turn in range(rounds + 1):
    for name, server in servers.items():
      os.killpg(server.pid, signal.SIGCONT)
      before = processor(server.pid)
      server.stdin.write("\n")
      server.stdin.flush()
      line = server.stdout.readline()
      if not line:
        raise SystemExit(f"{name} has ended")
      seconds, taken = json.loads(line)
      if turn:
        found[name].append((examples / seconds, 1e3 * (processor(server.pid) - before) / taken))
      os.killpg(server.pid, signal.SIGSTOP)


def main(argv):
  if len(argv) > 1:
    {"own": own, "bare": bare}[argv[1]](argv[2], *map(int, argv[3:]))
    return
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stopped servers are ended too
  machine.describe()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    size = make_tars(folder, _IMAGES.value)
    # What has been read ahead when a round begins is not timed.
    numbers = [str(n) for n in (_WORKERS.value, _BATCH.value, _TIMED.value, 2 * _WORKERS.value + 1)]
    here = [sys.executable, "-m", "benchmarks.input"]
    commands = {"bare loop": [*here, "bare", name, *numbers], "codebind_jax": [*here, "own", name, *numbers]}
    if _TORCH.value:
      peer = [_TORCH.value, "-c", _PEER, name, *numbers]
      commands |= {"open_clip": [*peer, "float32"], "open_clip, uint8": [*peer, "uint8"]}
    found = rates(commands, _ROUNDS.value, _BATCH.value * _TIMED.value)
  print(f"{_IMAGES.value} JPEG of {size / 1e3:.0f} kB in {_TARS} tars, {_WORKERS.value} workers, median of "
        f"{_ROUNDS.value} rounds of {_TIMED.value} batches of {_BATCH.value}; load {os.getloadavg()[0]:.1f}")
  for name, values in found.items():
    speeds, taken = zip(*values)
    faster = statistics.median(a / b for (a, _), (b, _) in zip(found["codebind_jax"], values))
    costs = statistics.median(a / b for (_, a), (_, b) in zip(found["codebind_jax"], values))
    print(f"{name:18s} {statistics.median(speeds):6.0f} examples/s ({min(speeds):.0f} to {max(speeds):.0f}), processor "
          f"{statistics.median(taken):.2f} ms an example;  codebind_jax / this: examples/s {faster:.2f}, processor "
          f"{costs:.2f}")  # fmt: skip


if __name__ == "__main__":
  app.run(main)
