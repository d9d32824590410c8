"""What limits zero-shot accuracy on unseen concepts: the number of concepts trained on, not the picture features.

Command: python -m benchmarks.unseen_concepts [--profile=small]
Ridge regression of the image trunk's features onto half-whitened text, on training rows alone: nine folds of held-out
concepts (about 61 each). Prints the accuracy for a growing share of the other concepts; with all of them and the
world's further named pictures (split "extra", without names that hold one of a held-out concept); and that of telling
the same held-out concepts from pictures of them by other artists (mean and standard error over folds).
"""

import hashlib

import numpy as np
from absl import app, flags

from codebind_jax import config as config_lib
from codebind_jax.data.task import open_task
from codebind_jax.data.worlds import extra
from codebind_jax.models.towers import whitening
from codebind_jax.trunks.feeds import Feeder
from configs import stage1

_PROFILE = flags.DEFINE_string("profile", "small", "Data profile of Icons.")
_FOLDS = 9
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)


def unit(x):
  """Rows of unit length."""
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def half_whitened(text):
  """Function that centres texts, half-whitens them by the statistics of `text`, and normalises."""
  mean, matrix = text.mean(0), whitening(text, 0.25)
  return lambda x: unit((x - mean) @ matrix)


def ridge(x, y):
  """Function from features to texts, fitted with a ridge of 0.3 of the features' mean variance a row."""
  mean, target = x.mean(0), y.mean(0)
  a = x - mean
  penalty = 0.3 * len(x) * a.var(0).mean()
  weights = a.T @ np.linalg.solve(a @ a.T + penalty * np.eye(len(a)), y - target)
  return lambda q: (q - mean) @ weights + target


def without(names, unseen):
  """Which names have no consecutive words that are one of the names `unseen`."""
  unseen = {extra.words(name) for name in unseen}
  spans = lambda own: {own[a:b] for a in range(len(own)) for b in range(a + 1, len(own) + 1)}
  return np.array([not spans(extra.words(name)) & unseen for name in names])


def pooled(feed, rows):
  """The clean pooled token of each row."""
  return np.stack([feed.clean(row)[0] for row in range(rows)]).astype(np.float64)


def main(_):
  """Prints the table."""
  config = stage1.get_config().unlock()
  config.data.profile = _PROFILE.value
  config.data.extra = 0.25
  config = config_lib.read(config)
  task, feeder = open_task(config.data), Feeder(config.data, config.model.towers)
  source = task.train["icons"]
  further = task.extra["icons"].select(range(len(source), len(task.extra["icons"])))
  images = pooled(feeder.clean(source, "image"), len(source))
  concept, family, label = (np.array(source.column(name)) for name in ("concept", "family", "label"))
  embed = lambda texts: pooled(feeder.texts(list(texts)), len(texts))
  words = embed(label)
  more_names = np.array(further.column("name"))
  more_images = pooled(feeder.clean(further, "image"), len(further))
  more_words = embed(more_names)
  fold = np.array([int(hashlib.sha256(name.encode()).hexdigest(), 16) % _FOLDS for name in concept])
  rng, accuracy, others = np.random.default_rng(0), {share: [] for share in ("more", *_SHARES)}, []
  for number in range(_FOLDS):
    test, names = np.flatnonzero(fold == number), np.unique(concept[fold != number])
    candidates = np.unique(label[test])
    order = rng.permutation(names)
    for share in accuracy:
      train = np.flatnonzero(np.isin(concept, order[: int((1.0 if share == "more" else share) * len(names))]))
      x, y = images[train], words[train]
      if share == "more":
        allowed = without(more_names, [*np.unique(concept[test]), *candidates])
        x, y = np.concatenate([x, more_images[allowed]]), np.concatenate([y, more_words[allowed]])
      space = half_whitened(y)
      predicted = unit(ridge(x, space(y))(images[test]))
      classes = unit(sum(space(embed([t.format(name) for name in candidates])) for t in config.data.eval_templates))
      accuracy[share].append(100 * np.mean(candidates[(predicted @ classes.T).argmax(1)] == label[test]))
    hits = []
    for artist in np.unique(family[test]):
      own, rest = family[test] == artist, family[test] != artist
      known = np.unique(label[test][rest])
      means = unit(np.stack([predicted[rest & (label[test] == name)].mean(0) for name in known]))
      own &= np.isin(label[test], known)
      hits.append(known[(predicted[own] @ means.T).argmax(1)] == label[test][own])
    others.append(100 * np.mean(np.concatenate(hits)))
  show = lambda values: f"{np.mean(values):5.1f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"
  for share in _SHARES:
    print(f"text, trained on {share:5.1%} of {len(names)} concepts: {show(accuracy[share])}")
  print(f"text, and {len(more_names)} further named pictures: {show(accuracy['more'])}")
  print(f"nearest mean of other artists' pictures:        {show(others)}")


if __name__ == "__main__":
  app.run(main)
