"""Torch checkpoints in zip containers, written without torch."""

import io
import pickle
import struct
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage",
            "uint8": "ByteStorage", "bfloat16": "BFloat16Storage", "bool": "BoolStorage"}  # fmt: skip


def _text(value):
  return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def _ints(values):
  return pickle.MARK + b"".join(pickle.BININT + struct.pack("<i", value) for value in values) + pickle.TUPLE


def _global(module, name):
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tensor(key, array):
  stride = np.array([step // array.itemsize for step in array.strides], int)
  pid = pickle.MARK + _text("storage") + _global("torch", STORAGES[array.dtype.name]) + _text(key) + _text("cpu")
  pid += pickle.BININT + struct.pack("<i", array.size) + pickle.TUPLE + pickle.BINPERSID
  hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
  arguments = pid + pickle.BININT + struct.pack("<i", 0) + _ints(array.shape) + _ints(stride) + pickle.NEWFALSE + hooks
  return _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def torch_zip(state, wrapper=""):
  """Bytes of what `torch.save(state)` writes for arrays by name; `wrapper` is a key that holds them."""
  arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
  body = b"".join(_text(name) + _tensor(str(i), array) for i, (name, array) in enumerate(arrays.items()))
  body = pickle.EMPTY_DICT + pickle.MARK + body + pickle.SETITEMS
  if wrapper:
    body = pickle.EMPTY_DICT + pickle.MARK + _text(wrapper) + body + pickle.SETITEMS
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    archive.writestr("net/data.pkl", pickle.PROTO + b"\x02" + body + pickle.STOP)
    archive.writestr("net/byteorder", "little")
    for i, array in enumerate(arrays.values()):
      archive.writestr(f"net/data/{i}", array.tobytes())
  return out.getvalue()
