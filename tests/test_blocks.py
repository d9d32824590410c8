"""Items of worker processes in shared memory: what comes back, when memory is used again, and that nothing is left."""

import contextlib
import gc
import threading

import numpy as np
import pytest

from codebind_jax.data import ahead as ahead_lib
from codebind_jax.data.ahead import ahead, spread
from codebind_jax.data.blocks import Block


class Shared:
  """Items that a worker writes to the block."""

  def __getitem__(self, number):
    array = ahead_lib.empty((2_000,), np.int32)
    array[:] = number
    return {"array": array}


@pytest.fixture
def block():
  made = Block()
  yield made
  made.close()


def test_a_value_comes_back_with_its_arrays_in_the_block(block):
  inside = block.empty((3, 5), np.float16)
  inside[:] = np.arange(15).reshape(3, 5)
  value = {"in": inside, "out": np.arange(70_000), "turned": np.arange(6).reshape(2, 3).T, "none": np.zeros((0, 2)),
           "text": "é", "bits": np.array([True, False])}  # fmt: skip
  found, whole = block.loads(*block.dumps(value))
  assert found.keys() == value.keys() and found["text"] == "é"
  for name in value.keys() - {"text"}:
    assert found[name].dtype == value[name].dtype
    np.testing.assert_array_equal(found[name], value[name])
    assert not found[name].size or np.shares_memory(found[name], whole)
  assert np.shares_memory(found["in"], whole) and found["in"].flags.writeable
  inside[0, 0] = 7  # the same memory, not a copy of it
  assert found["in"][0, 0] == 7


def test_arrays_stay_when_the_block_grows(block):
  first = block.empty((10,), np.int64)
  first[:] = 5
  second = block.empty((1_000_000,), np.int64)
  second[:] = 6
  found, _ = block.loads(*block.dumps([first, second, first[:4]]))
  assert all((part == number).all() for part, number in zip(found, (5, 6, 5))) and len(found[2]) == 4


def test_items_that_are_kept_are_not_written_over():
  with contextlib.closing(ahead(Shared(), workers=1)) as following:
    kept = [next(following) for _ in range(12)]  # more than there are blocks
    assert [int(item["array"][0]) for item in kept] == list(range(12))
    del kept[1:]
    gc.collect()
    later = [int(next(following)["array"][-1]) for _ in range(12)]
  assert later == list(range(12, 24)) and (kept[0]["array"] == 0).all()  # also when all have ended


def test_the_parts_of_an_item_are_read_by_several_threads_at_once():
  together = threading.Barrier(4, timeout=20)  # nobody passes before four threads read

  class Parts:
    def __getitem__(self, number):
      return spread(lambda part: (together.wait() >= 0, part), range(8))

  with contextlib.closing(ahead(Parts(), threads=4, stop=2, parts=True)) as following:
    assert [[part for _, part in item] for item in following] == [list(range(8))] * 2


def test_an_error_of_a_part_is_raised_and_the_threads_go_on():
  class Parts:
    def __getitem__(self, number):
      return spread(lambda part: 1 // (part - 3) and number, range(8))

  with pytest.raises(ZeroDivisionError), contextlib.closing(ahead(Parts(), threads=3, parts=True)) as following:
    next(following)
  assert spread(str, [1, 2]) == ["1", "2"] and not hasattr(ahead_lib._reading, "pool")
