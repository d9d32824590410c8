"""Files that are replaced whole, and locks between processes."""

import threading

import pytest

from codebind_jax.files import lock, replacing, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  write_whole(path, "old ä\n")
  with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
    temporary.write_bytes(b"half")
    assert path.read_text(encoding="utf-8") == "old ä\n"
    raise KeyboardInterrupt
  assert path.read_text(encoding="utf-8") == "old ä\n" and list(tmp_path.iterdir()) == [path]
  with replacing(path) as first, replacing(path) as second:
    first.write_bytes(b"1")
    second.write_bytes(b"2")
  assert path.read_bytes() == b"1" and list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
  pytest.importorskip("fcntl")
  order, waiting = [], threading.Event()

  def second():
    waiting.set()
    with lock(tmp_path / ".lock", "works here"):
      order.append("second")

  thread = threading.Thread(target=second)
  with lock(tmp_path / ".lock", "works here"):
    thread.start()
    waiting.wait()
    thread.join(0.2)
    order.append("first")
  thread.join()
  assert order == ["first", "second"]
