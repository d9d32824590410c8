"""Reading torch checkpoints without torch: values as saved, and nothing foreign is ever run."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codebind_jax.trunks.torch_pickle import load_torch_pickle

STORAGES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage", "u1": "ByteStorage"}


def opcodes_string(text):
  return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def opcodes_int(value):
  return pickle.BININT + struct.pack("<i", value)


def opcodes_tuple(items):
  return pickle.MARK + b"".join(items) + pickle.TUPLE


def opcodes_global(module, name):
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def opcodes_tensor(key, storage, count, offset, shape, stride):
  """What torch writes for a tensor: _rebuild_tensor_v2(persistent id, offset, shape, stride, False, OrderedDict())."""
  pid = opcodes_tuple([
    opcodes_string("storage"), opcodes_global("torch", storage), opcodes_string(key), opcodes_string("cpu"),
    opcodes_int(count), pickle.NONE,
  ])  # fmt: skip
  hooks = opcodes_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
  arguments = opcodes_tuple([
    pid + pickle.BINPERSID, opcodes_int(offset), opcodes_tuple(map(opcodes_int, shape)),
    opcodes_tuple(map(opcodes_int, stride)), pickle.NEWFALSE, hooks,
  ])  # fmt: skip
  return opcodes_global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def object_pickle(tensors):
  """A pickled dictionary name -> tensor; `tensors` holds (name, key, storage, count, offset, shape, stride)."""
  body = b"".join(opcodes_string(name) + opcodes_tensor(*rest) for name, *rest in tensors)
  return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + body + pickle.SETITEMS + pickle.STOP


def old_stream(body, storages, system=None):
  system = system or {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
  head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
  raw = b"".join(struct.pack("<q", values.size) + values.tobytes() for values in storages.values())
  return head + body + pickle.dumps(list(storages), 2) + raw


def new_zip(body, storages):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    archive.writestr("net/data.pkl", body)
    archive.writestr("net/byteorder", "little")
    for key, values in storages.items():
      archive.writestr(f"net/data/{key}", values.tobytes())
  return out.getvalue()


CONTAINERS = pytest.mark.parametrize("container", [old_stream, new_zip])


@CONTAINERS
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_values_types_offsets_and_strides(container, data):
  kind = data.draw(st.sampled_from(sorted(STORAGES)))
  shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
  offset = data.draw(st.integers(0, 3))
  order = data.draw(st.permutations(range(len(shape))))
  flat = np.arange(offset + int(np.prod(shape)) + 2).astype(kind)
  contiguous = flat[offset : offset + int(np.prod(shape))].reshape([shape[axis] for axis in order])
  expected = contiguous.transpose(np.argsort(order)) if shape else contiguous
  stride = [step // flat.itemsize for step in expected.strides]
  body = object_pickle([("w", "0", STORAGES[kind], flat.size, offset, shape, stride)])
  loaded = load_torch_pickle(container(body, {"0": flat}))
  assert list(loaded) == ["w"] and loaded["w"].dtype == expected.dtype
  np.testing.assert_array_equal(loaded["w"], expected)


@CONTAINERS
def test_tensors_may_share_a_storage_but_not_memory(container):
  flat = np.arange(6, dtype="f4")
  body = object_pickle([("a", "7", "FloatStorage", 6, 0, (6,), (1,)), ("b", "7", "FloatStorage", 6, 2, (2, 2), (2, 1))])
  loaded = load_torch_pickle(container(body, {"7": flat}))
  loaded["a"][:] = -1
  np.testing.assert_array_equal(loaded["b"], [[2, 3], [4, 5]])


class Evil:
  """Runs a command when it is unpickled by an ordinary unpickler."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@CONTAINERS
def test_a_malicious_pickle_is_refused_and_not_run(container, protocol, tmp_path):
  body = pickle.dumps({"weight": Evil(tmp_path / "ran")}, protocol)
  with pytest.raises(ValueError, match=r"refused to unpickle \w+\.system"):
    load_torch_pickle(container(body, {}))
  assert not (tmp_path / "ran").exists()
  pickle.loads(body)
  assert (tmp_path / "ran").exists(), "the file would have run its command elsewhere"


def test_a_malicious_header_is_refused(tmp_path):
  with pytest.raises(ValueError, match="refused"):
    load_torch_pickle(pickle.dumps(Evil(tmp_path / "ran")))
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["builtins eval", "torch load", "torch FloatStorage.__class__", "torch._utils x"])
def test_only_known_names_pass(path):
  module, name = path.split()
  body = b"\x80\x02" + opcodes_global(module, name) + opcodes_tuple([opcodes_string("1")]) + pickle.REDUCE + pickle.STOP
  with pytest.raises(ValueError, match="refused to unpickle"):
    load_torch_pickle(old_stream(body, {}))


@pytest.mark.parametrize(
  ("offset", "shape", "stride"),
  [(0, (4,), (1,)), (2, (2,), (1,)), (0, (2,), (3,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (2, (2,), (-1,))],
)
@CONTAINERS
def test_a_tensor_must_lie_inside_its_storage(container, offset, shape, stride):
  body = object_pickle([("w", "0", "FloatStorage", 3, offset, shape, stride)])
  with pytest.raises(ValueError, match="does not fit its storage of 3 values"):
    load_torch_pickle(container(body, {"0": np.zeros(3, "f4")}))


@CONTAINERS
def test_damage_is_named(container, tmp_path):
  body = object_pickle([("w", "0", "FloatStorage", 1000, 0, (1000,), (1,))])
  whole = container(body, {"0": np.zeros(1000, "f4")})
  path = tmp_path / "net.pth"
  for size in (0, 3, 40, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError):
      load_torch_pickle(path)
  path.write_bytes(whole)
  assert load_torch_pickle(path)["w"].shape == (1000,)


def test_storage_counts_must_agree():
  body = object_pickle([("w", "0", "FloatStorage", 4, 0, (4,), (1,))])
  with pytest.raises(ValueError, match="storage '0' has 3 values, its tensors expect 4"):
    load_torch_pickle(old_stream(body, {"0": np.zeros(3, "f4")}))
  with pytest.raises(ValueError, match="storage '0' has 12 bytes"):
    load_torch_pickle(new_zip(body, {"0": np.zeros(3, "f4")}))
  with pytest.raises(ValueError, match="missing"):
    load_torch_pickle(new_zip(body, {}))


def test_a_file_that_is_no_checkpoint():
  with pytest.raises(ValueError, match="magic"):
    load_torch_pickle(pickle.dumps(1, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2))
  with pytest.raises(ValueError, match="notes.txt: not a readable torch checkpoint"):
    load_torch_pickle(b"hello there", name="notes.txt")
  with pytest.raises(ValueError, match="big-endian"):
    load_torch_pickle(old_stream(object_pickle([]), {}, {"little_endian": False}))


def numpy_number_pickle(code, raw, module="numpy.core.multiarray"):
  """What torch writes for a numpy number beside the tensors, in protocol 2."""
  kind = opcodes_global("numpy", "dtype") + opcodes_string(code) + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3
  state = opcodes_tuple([
    opcodes_int(3), opcodes_string("<"), pickle.NONE, pickle.NONE, pickle.NONE, opcodes_int(-1), opcodes_int(-1),
    opcodes_int(0),
  ])  # fmt: skip
  text = opcodes_string(raw.decode("latin1")) + opcodes_string("latin1") + pickle.TUPLE2
  content = opcodes_global("_codecs", "encode") + text + pickle.REDUCE
  number = opcodes_global(module, "scalar") + kind + pickle.REDUCE + state + pickle.BUILD + content + pickle.TUPLE2
  return pickle.PROTO + b"\x02" + number + pickle.REDUCE + pickle.STOP


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("number", [np.int64(-7), np.float32(0.5), np.bool_(True)])
def test_a_numpy_number_beside_the_tensors(number, module):
  code = number.dtype.str[1:]
  got = load_torch_pickle(new_zip(numpy_number_pickle(code, number.tobytes(), module), {}))
  assert got == number and type(got) is type(number.item())


@pytest.mark.parametrize("code", ["O8", "V4", "i8,i8"])
def test_a_numpy_number_of_another_kind_is_refused(code):
  with pytest.raises(ValueError, match="refused a numpy number"):
    load_torch_pickle(new_zip(numpy_number_pickle(code, bytes(8)), {}))
