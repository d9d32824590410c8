"""Files of a run: closed with the stage that opened them, and named when a disk is full or cannot be written."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from codebind_jax import files
from codebind_jax.data import index_cache, opening, ranges, shards
from codebind_jax.data.blocks import Block
from codebind_jax.data.joined import Joined, joined
from codebind_jax.embedding import shards as embedded
from codebind_jax.files import temporary
from codebind_jax.runtime import metrics
from codebind_jax.search import Index
from codebind_jax.trunks import cache
from codebind_jax.trunks.cache import TokenCache
from tests.test_features import Images, files_of, mean_trunk, tokens_at
from tests.train_fixtures import write_manifest


def open_below(folder):
  """Files below a folder that this process has open."""
  links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
  return sorted(link for link in links if link.startswith(f"{folder}/"))


# What reading opens.


def test_files_of_sources_and_tokens_are_closed_and_open_again(tmp_path):
  manifest = write_manifest(tmp_path / "squares")
  lines = opening.open_source(manifest)
  shards.write_all(shards.Job.of(lines, shards.make_plan(lines, 1 << 20, check="none"), tmp_path / "shards"))
  records = opening.open_source(f"{tmp_path}/shards/*.array_record")
  whole = joined([lines.select(range(3)), records.select(range(3, 6))])
  assert isinstance(whole, Joined)
  first = [(whole.fields(row), whole.content_hash(row, "image")) for row in range(6)]
  ranges.File(manifest, ranges.stamp(manifest)).read(0, 10)
  assert {os.path.splitext(name)[1] for name in open_below(tmp_path)} == {".jsonl", ".array_record"}
  whole.close()
  assert open_below(tmp_path) == []
  assert [(whole.fields(row), whole.content_hash(row, "image")) for row in range(6)] == first
  whole.close()
  images, store = Images(3), TokenCache(tmp_path / "tokens", mean_trunk())
  places, _ = store.fill(images.keys, images)
  read = tokens_at(store, places)
  assert open_below(tmp_path)
  store.reader.close()
  assert open_below(tmp_path) == []
  np.testing.assert_array_equal(tokens_at(store, places), read)
  store.reader.close()
