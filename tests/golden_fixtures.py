"""Reading golden fixtures, and parameters recorded from torch modules as flax trees."""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


def load(name):
  with np.load(FOLDER / f"{name}.npz") as data:
    return dict(data)


def close(got, want, tolerance):
  """Largest difference, relative to the largest entry wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  error = np.max(np.abs(got - want), initial=0.0) / max(np.max(np.abs(want), initial=0.0), 1e-30)
  assert error < tolerance, error


def dense(data, name):
  """torch.nn.Linear -> flax Dense."""
  return {"kernel": np.asarray(data[f"{name}.weight"], np.float64).T, "bias": np.asarray(data[f"{name}.bias"], float)}


def gaussian(data, prefix):
  """The CLUB network of the release -> ConditionalGaussian."""
  sides = {"mean": "p_mu", "logvar": "p_logvar"}
  return {f"{ours}{i}": dense(data, f"{prefix}/{theirs}.{2 * i}") for ours, theirs in sides.items() for i in range(4)}


def predictor(data, prefix, modality, *, layers=2, steps=1):
  """LSTM and predictors of the release -> FuturePredictor; torch stacks the gates i, f, g, o and has two biases."""
  tree = {}
  for layer in range(layers):
    lstm = f"{prefix}/{modality}_ar_lstm"
    inward, hidden = (np.split(np.asarray(data[f"{lstm}.weight_{x}_l{layer}"], float), 4) for x in ("ih", "hh"))
    bias = np.split(sum(np.asarray(data[f"{lstm}.bias_{x}_l{layer}"], float) for x in ("ih", "hh")), 4)
    cell = {f"i{gate}": {"kernel": w.T} for gate, w in zip("ifgo", inward)}
    cell |= {f"h{gate}": {"kernel": w.T, "bias": b} for gate, w, b in zip("ifgo", hidden, bias)}
    tree[f"OptimizedLSTMCell_{layer}"] = cell
  return tree | {f"predict{k}": dense(data, f"{prefix}/{modality}_predictors.{k}") for k in range(steps)}
