"""`codebind_jax.load(folder).embed` of 100 images and texts against transformers on torch: ViT-B/32, random weights.

Run: python -m benchmarks.encoders [--torch=PYTHON]   (needs pip install -e '.[parity]', here or in the other PYTHON)
Each contender is a process of its own; they are timed in turn, preparation of raw pixels and texts included.
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import machine

_TORCH = flags.DEFINE_string("torch", sys.executable, "Python that has torch and transformers.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, after one that is not.")
_ITEMS = flags.DEFINE_integer("items", 100, "Images, and texts.")

# Writes a random checkpoint in Hugging Face layout, then serves as the torch contender.
_PEER = """
import json, resource, sys, time
import numpy as np, torch, transformers as T
folder, items, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if what == "make":
  torch.manual_seed(0)
  model = T.CLIPModel(T.CLIPConfig())
  model.save_pretrained(folder)
  T.CLIPImageProcessor().save_pretrained(folder)
  sys.exit()
model = T.CLIPModel.from_pretrained(folder).eval()
processor = T.CLIPImageProcessor.from_pretrained(folder)
tokenizer = T.PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json", pad_token="<|endoftext|>")
data = np.load(folder + "/items.npz")
images, texts = list(data["images"][:items]), [str(t) for t in data["texts"][:items]]
unit = lambda x: torch.nn.functional.normalize(getattr(x, "pooler_output", x), dim=-1).numpy()
for line in sys.stdin:
  start = time.perf_counter()
  with torch.inference_mode():
    pixels = lambda i: processor(images[i:i + 32], return_tensors="pt")["pixel_values"]
    a = [model.get_image_features(pixels(i)) for i in range(0, items, 32)]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    b = [model.get_text_features(ids["input_ids"][i:i + 32]) for i in range(0, items, 32)]
  found = [np.concatenate([unit(x) for x in part]) for part in (a, b)]
  seconds = time.perf_counter() - start
  np.savez(folder + "/torch.npz", image=found[0], text=found[1])
  print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]), flush=True)
"""


def own(folder, items):
  """The contender of this package: a line in, a line with seconds and megabytes out."""
  import codebind_jax

  model = codebind_jax.load(folder)
  data = np.load(pathlib.Path(folder) / "items.npz")
  inputs = {"image": list(data["images"][:items]), "text": [str(text) for text in data["texts"][:items]]}
  for _ in sys.stdin:
    start = time.perf_counter()
    found = model.embed(inputs)
    seconds = time.perf_counter() - start
    np.savez(pathlib.Path(folder) / "own.npz", **{name: part.shared for name, part in found.items()})
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]), flush=True)


def main(argv):
  if len(argv) > 1:
    own(argv[1], int(argv[2]))
    return
  machine.describe()
  with tempfile.TemporaryDirectory() as folder:
    peer = [_TORCH.value, "-c", _PEER, folder, str(_ITEMS.value)]
    subprocess.run([*peer, "make"], check=True, capture_output=True)
    from codebind_jax.data.preparation.texts import clip_tokenizer

    clip_tokenizer().save(f"{folder}/tokenizer.json")
    rng = np.random.default_rng(0)
    words = np.array("a photo of red blue small large cow dog boat tree house sun owl road".split())
    texts = [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(_ITEMS.value)]
    np.savez(f"{folder}/items.npz", images=rng.integers(0, 256, (_ITEMS.value, 256, 320, 3), np.uint8), texts=texts)
    command = {"torch": [*peer, "run"], "codebind_jax": [sys.executable, "-m", "benchmarks.encoders", folder,
                                                         str(_ITEMS.value)]}  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen(line, **pipes) for name, line in command.items()}
    taken, memory = {name: [] for name in workers}, {}
    for turn in range(_ROUNDS.value + 1):
      for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        seconds, memory[name] = json.loads(worker.stdout.readline())
        if turn:
          taken[name].append(seconds)
    for worker in workers.values():
      worker.stdin.close()
      worker.wait()
    for name, values in taken.items():
      print(f"{name:14s} {statistics.median(values):6.2f} s for {_ITEMS.value} images and texts, peak memory "
            f"{memory[name]:,.0f} MB")  # fmt: skip
    ratio = statistics.median(a / b for a, b in zip(taken["codebind_jax"], taken["torch"]))
    print(f"time, codebind_jax / torch: {ratio:.2f}; memory: {memory['codebind_jax'] / memory['torch']:.2f}")
    found = [np.load(f"{folder}/{name}.npz") for name in ("own", "torch")]
    for name in ("image", "text"):
      print(f"largest difference of {name} embeddings: {np.abs(found[0][name] - found[1][name]).max():.1e}")


if __name__ == "__main__":
  app.run(main)
