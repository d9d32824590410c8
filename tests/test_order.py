"""The order of rows that are read in blocks."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codebind_jax.data.batches import SourceBatches
from codebind_jax.data.examples import Texts
from codebind_jax.data.opening import open_source
from codebind_jax.data.order import WINDOW, BlockOrder
from codebind_jax.trunks import load_trunk


@pytest.mark.parametrize("rows, block", [(1000, 16), (1003, 16), (5, 16), (64, 1)])
def test_an_epoch_visits_every_row_once_and_another_one_in_another_order(rows, block):
  order = BlockOrder(rows, block, rows, seed=3)
  first, second = ([order.map(epoch * rows + at) for at in range(rows)] for epoch in (0, 1))
  assert sorted(first) == sorted(second) == list(range(rows))
  assert first != second and first != sorted(first)
  assert BlockOrder(rows, block, rows, seed=4).map(0) != first[0] or rows < 10


def test_at_most_a_window_of_blocks_is_open():
  rows, block = 4096, 32
  order = BlockOrder(rows, block, rows, seed=0)
  for start in range(0, rows, WINDOW * block):
    numbers = np.array([order.map(start + at) for at in range(WINDOW * block)])
    assert len(set(numbers // block)) == WINDOW
    assert (np.diff(numbers) == 1).mean() < 0.05  # mixed within the window
  windows = [{order.map(start + at) // block for at in range(WINDOW * block)} for start in (0, WINDOW * block)]
  assert not windows[0] & windows[1]


def test_the_last_rows_of_an_epoch_are_left_out():
  order = BlockOrder(100, 8, 96, seed=1)
  first = [order.map(at) for at in range(96)]
  assert len(set(first)) == 96 and order.map(96) == BlockOrder(100, 8, 96, seed=1).map(96)
  assert set(first) != {order.map(96 + at) for at in range(96)}  # others in the next epoch


def test_a_position_needs_no_earlier_one_and_a_copy_gives_the_same():
  order = BlockOrder(10_000, 64, 10_000, seed=5)
  late = pickle.loads(pickle.dumps(order))
  assert [late.map(at) for at in (29_999, 5, 12_345)] == [order.map(at) for at in (29_999, 5, 12_345)]


def test_batches_of_a_parquet_file_visit_its_rows_by_windows_of_groups(tmp_path):
  texts = [f"thing {i}" for i in range(400)]
  table = pa.table({"id": [f"r{i}" for i in range(400)], "text": texts})
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
  source = open_source(tmp_path / "a.parquet", data_dir=tmp_path)
  feed = Texts(source, load_trunk("hashed_words", width=8).input)
  batches = SourceBatches(source, {"text": feed}, rows=16, seed=2)
  rows = np.concatenate([batches[step]["_row"] for step in range(25)])
  assert sorted(rows) == list(range(400))
  assert len(set(rows[: 10 * WINDOW] // 10)) == WINDOW
  assert not np.array_equal(batches[0]["_row"], batches[25]["_row"])
  parts = [SourceBatches(source, {"text": feed}, rows=16, seed=2, process=p, processes=2)[7]["_row"] for p in (0, 1)]
  np.testing.assert_array_equal(np.concatenate(parts), batches[7]["_row"])
