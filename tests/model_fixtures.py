"""Reads the fixtures of tests/golden/README_models.md: what the CodeBind and ImageBind releases computed."""

import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np

from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.imagebind import HUGE
from codebind_jax.trunks import imagebind, names
from codebind_jax.trunks.checkpoint_files import Entry, Weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
MODALITIES = ("image", "text", "audio", "depth", "thermal", "tactile", "imu", "eeg")
SHARED = 24
SPECIFIC = {"image": 24, "text": 0, "audio": 24, "depth": 16, "thermal": 16, "tactile": 16, "imu": 16, "eeg": 16}
CLIPS = {"audio": 2, "video": 2}
# The models are so small that compiling is the time a test takes: half of it without LLVM's optimisations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def golden(name):
  """Arrays of one file; uint16 arrays are bfloat16 bit patterns."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  return {k: a.view(ml_dtypes.bfloat16).astype(np.float32) if a.dtype == np.uint16 else a for k, a in arrays.items()}


@functools.cache
def state_dict(prefix="w/", name="codebind_model_tiny_weights"):
  """Official names -> arrays; rows of the token embedding that no fixture uses are zero."""
  arrays = golden(name)
  found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
  table = "modality_preprocessors.text.token_embedding.weight"
  if table in found:
    full = np.zeros((49408, found[table].shape[1]), np.float32)
    full[arrays["vocab/rows"]] = found[table]
    found[table] = full
  return found


def official(modality):
  return "vision" if modality == "image" else modality


def weights(arrays, name="golden"):
  """Arrays in the form of an opened checkpoint."""
  entries = {key: Entry(value.shape, value.dtype, lambda value=value: value) for key, value in arrays.items()}
  return Weights(entries, (pathlib.Path(name),))


def load(tree, rules, prefix, arrays):
  """Parameters shaped as `tree` from the official names that begin with `prefix`."""
  return jax.device_get(names.load(tree, imagebind.part_of(weights(arrays), prefix), rules))


@functools.cache
def spec(modality):
  """The tiny encoder that made the fixture: the released shapes with the fixture's widths and depths."""
  sizes = json.loads(str(golden("codebind_model_tiny_weights")["meta/config"]))["kwargs"]
  width, depth, heads = (sizes[f"{official(modality)}_{key}"] for key in ("embed_dim", "num_blocks", "num_heads"))
  changes = {"size": (sizes["eeg_data_len"],), "patch": (sizes["eeg_patch_size"],)} if modality == "eeg" else {}
  return EncoderSpec(**{**vars(HUGE[modality]), "width": width, "depth": depth, "heads": heads, **changes})


@functools.cache
def inputs(name):
  """A fixture's input in our layout, channels last; `name` is a modality or `video`."""
  x = golden("codebind_model_tiny_inputs")[f"in/{official(name)}"]
  return x if name == "text" else np.moveaxis(x, 2 if name in ("audio", "video") else 1, -1)


@functools.cache
def encoder_params(modality):
  tree = jax.eval_shape(Encoder(spec(modality)).init, jax.random.key(0), spec(modality).example())["params"]
  part = imagebind.encoder_weights(weights(state_dict()), modality)
  return jax.device_get(names.load(tree, part, imagebind.encoder_rules(modality)))


@functools.cache
def encoded(name):
  """Our encoder's output on the fixture's input, as numpy."""
  modality = "image" if name == "video" else name
  return jax.device_get(jit(Encoder(spec(modality)).apply)({"params": encoder_params(modality)}, inputs(name)))


def error(ours, theirs):
  """Largest difference over the largest entry, as the fixtures' tolerances are given."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
