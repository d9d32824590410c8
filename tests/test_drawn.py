"""Batches kept for runs that read the same ones."""

import numpy as np

from codebind_jax.data.batches import Drawn, FeatureTable, Replay, make_iterator


def test_kept_batches_are_the_iterators_and_can_be_continued_anywhere():
  rows = np.arange(20, dtype=np.float16)[:, None, None, None] * np.ones((1, 1, 1, 3), np.float16)
  table = FeatureTable(rows, [[i] for i in range(20)])
  make = lambda: make_iterator({"a": table}, [f"l{i}" for i in range(20)], batch_size=4, seed=3)
  numbers = lambda it, count: [next(it)["_row"].tolist() for _ in range(count)]
  plain = numbers(make(), 9)
  made = []
  drawn = Drawn(lambda: made.append(1) or make())
  first, second = Replay(drawn), Replay(drawn)
  assert numbers(first, 3) == plain[:3] and numbers(second, 5) == plain[:5] and numbers(first, 1) == plain[3:4]
  assert len(made) == 1
  at = make()
  numbers(at, 4)
  assert first.get_state() == at.get_state()  # a checkpoint does not tell them apart
  back = Replay(drawn)
  back.set_state(at.get_state())
  assert numbers(back, 2) == plain[4:6] and len(made) == 1
  beyond = make()
  numbers(beyond, 7)
  late = Replay(drawn)
  late.set_state(beyond.get_state())  # which nobody has come to yet
  assert numbers(late, 2) == plain[7:9] and len(made) == 2
  numbers(beyond, 2)
  assert late.get_state() == beyond.get_state()
  assert numbers(Replay(drawn), 6) == plain[:6]
