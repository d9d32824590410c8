"""Each reader of foreign files with small whole files of its formats, for `tests.fuzz`."""

import functools
import io
import json
import pickle
import struct
import tarfile

import numpy as np
from PIL import Image

from codebind_jax.data import transforms
from codebind_jax.data.formats import array_record, folder, hugging_face, jsonl, parquet, table, tar
from codebind_jax.data.preparation.texts import clip_ids
from codebind_jax.data.worlds import archives
from codebind_jax.trunks.checkpoint_files import open_weights, read_member
from tests import fuzz_kept
from tests.fuzz import Reader, json_mutant
from tests.test_pretrained_pickle import new_zip, numpy_number_pickle, object_pickle, old_stream, opcodes_string
from tests.torch_files import torch_zip
from tests.world_fixtures import deb, rcc, tgz, wheel

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
CLOUD = RNG.normal(size=(12, 3)).round(3).astype(np.float32)
FACES = np.array([[0, 1, 2], [2, 3, 4], [4, 5, 6]])


def saved(writer, *arguments, **options):
  """What a function writes into a file."""
  out = io.BytesIO()
  writer(out, *arguments, **options)
  return out.getvalue()


def picture(kind, pixels=PIXELS, **options):
  return saved(Image.fromarray(pixels).save, kind, **options)


def animation(kind):
  frames = [Image.fromarray(np.roll(PIXELS, i, 0)) for i in range(3)]
  return saved(frames[0].save, kind, save_all=True, append_images=frames[1:], duration=[100, 300, 100])


def turned():
  exif = Image.Exif()
  exif[274] = 6
  return exif.tobytes()


PICTURES = {
  "png": lambda: [picture("png"), picture("png", PIXELS[..., 0].astype(np.uint16) * 200),
                  saved(Image.fromarray(PIXELS).quantize(8).save, "png", transparency=2)],
  "jpeg": lambda: [picture("jpeg"), picture("jpeg", progressive=True, exif=turned()), picture("jpeg", PIXELS[..., 0])],
  "webp": lambda: [picture("webp"), picture("webp", lossless=True), animation("webp")],
  "gif": lambda: [picture("gif", PIXELS[..., 0]), animation("gif")],
  "bmp": lambda: [picture("bmp"), picture("bmp", PIXELS[..., 0])],
  "ppm": lambda: [picture("ppm"), picture("ppm", PIXELS[..., 0]), b"P3\n2 2\n255\n" + b"0 10 255 " * 4],
  "tiff": lambda: [picture("tiff"), picture("tiff", compression="tiff_lzw"),
                   picture("tiff", compression="tiff_deflate"),
                   picture("tiff", PIXELS[..., 0].astype(np.float32) / 255)],
  "jpeg2000": lambda: [picture("jpeg2000")],
  "avif": lambda: [picture("avif")],
}  # fmt: skip


def float_tiff(kind="<f8", channels=1):
  """One strip that Pillow does not read, by tifffile's own rules: tags in order, values behind."""
  values = (np.arange(12 * channels) / 10).astype(kind)
  tags = [(256, 4), (257, 3), (258, values.itemsize * 8), (259, 1), (262, 1), (273, 0), (277, channels), (278, 3),
          (279, values.nbytes), (339, 3)]  # fmt: skip
  start = 8 + 2 + 12 * len(tags) + 4
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
  return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4) + values.tobytes()


def npy(array):
  return saved(np.save, array)


def film(kind, codec, frames=2):
  import av

  out = io.BytesIO()
  with av.open(out, "w", format=kind) as file:
    stream = file.add_stream(codec, rate=10)
    stream.width = stream.height = 16
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    for i in range(frames):
      file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 80 * i, np.uint8))))
    file.mux(stream.encode())
  return out.getvalue()


def sound(kind, channels=1, **options):
  import soundfile

  samples = 0.3 * np.sin(np.arange(900)[:, None] * np.linspace(0.1, 0.2, channels))
  out = io.BytesIO()
  soundfile.write(out, samples, 8000, format=kind, **options)
  return out.getvalue()


def edf(bdf=False):
  labels = ["EEG Fz", "EEG Cz", "ECG", "EDF Annotations"]
  width, samples = 3 if bdf else 2, [8, 8, 4, 8]
  head = (b"\xffBIOSEMI" if bdf else b"0       ") + b" " * 176 + f"{256 * 5:<8}".encode() + b" " * 44
  head += b"2       1       4   "
  for texts, size in (
    (labels, 16), ([""] * 4, 80), (["uV"] * 4, 8), (["-100"] * 4, 8), (["100"] * 4, 8), (["-2000"] * 4, 8),
    (["2000"] * 4, 8), ([""] * 4, 80), (map(str, samples), 8), ([""] * 4, 32),
  ):  # fmt: skip
    head += b"".join(text.ljust(size).encode() for text in texts)
  records = []
  for at in range(2):
    values = RNG.integers(-900, 900, sum(samples[:3]))
    body = b"".join(int(v).to_bytes(width, "little", signed=True) for v in values)
    records.append(body + f"+{at}\x14\x14\0".encode().ljust(width * 8, b"\0"))
  return head + b"".join(records)


def pcd(kind):
  fields = b"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 12\nHEIGHT 1\nPOINTS 12\nDATA "
  if kind == "ascii":
    return fields + b"ascii\n" + "\n".join(" ".join(map(str, row)) for row in CLOUD.tolist()).encode()
  if kind == "binary":
    return fields + b"binary\n" + CLOUD.tobytes()
  raw = CLOUD.T.tobytes()
  packed = b"".join(bytes([len(raw[i : i + 32]) - 1]) + raw[i : i + 32] for i in range(0, len(raw), 32))
  return fields + b"binary_compressed\n" + struct.pack("<II", len(packed), len(raw)) + packed


def mesh(kind):
  import trimesh

  content = trimesh.Trimesh(CLOUD, FACES, process=False).export(file_type=kind)
  return content.encode() if isinstance(content, str) else content


def ply(form):
  head = f"ply\nformat {form} 1.0\nelement vertex 12\nproperty float x\nproperty float y\nproperty float z\n"
  head += "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
  if form == "ascii":
    return (head + "".join(" ".join(map(str, [*row, 1, 2, 3])) + "\n" for row in CLOUD.tolist())).encode()
  return head.encode() + b"".join(row.tobytes() + b"\1\2\3" for row in CLOUD)


POINTS = {
  "npy": lambda: [npy(CLOUD)],
  "pcd": lambda: [pcd("ascii"), pcd("binary"), pcd("binary_compressed")],
  "ply": lambda: [ply("ascii"), ply("binary_little_endian"), mesh("ply")],
  "obj": lambda: [mesh("obj"), b"".join(b"v %f %f %f\n" % tuple(row) for row in CLOUD)],
  "off": lambda: [mesh("off")],
  "stl": lambda: [mesh("stl"), mesh("stl_ascii")],
  "glb": lambda: [mesh("glb")],
  "table": lambda: ["\n".join(" ".join(map(str, row)) for row in CLOUD.tolist()).encode(),
                    b"x,y,z\n" + b"0.1,0.2,0.3\n" * 3 + b"1,2,3\n"],
}  # fmt: skip


@functools.cache
def _clip():
  return clip_ids()


def read_text(content):
  """A text of any Unicode, through cleaning and tokenizer."""
  return _clip()(content.decode("utf-16-le" if len(content) % 7 == 0 else "utf-8", "replace"))


def texts():
  return ["A dog &amp; a cat ✓ naïve, ３ 犬".encode(), b"a photo of a red square " * 8, "\u0645\u0631 e\u0301".encode()]


# --- checkpoints


def read_weights(path):
  """All arrays of a checkpoint."""
  return {name: entry.read() for name, entry in open_weights(path).items()}


def read_index(path):
  """A sharded checkpoint by its index, beside one good shard."""
  shard = path.with_name("a.safetensors")
  if not shard.exists():
    shard.write_bytes(safetensors())
  return read_weights(path)


def read_shapes(path):
  """Shapes of a checkpoint, which stand for it."""
  return dict(open_weights(path.with_name(path.name.removesuffix(".shapes.json"))))


def read_wheel(path):
  return read_member(path, "a/b.bin")


ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.float16)}


def safetensors():
  import safetensors.numpy as numpy

  return numpy.save(ARRAYS)


def shapes_file():
  tensors = {"w": ["float32", [2, 3], [0.0, 1, 2, 3, 4, 5]], "b": ["bfloat16", [300]]}
  return json.dumps({"file": "a" * 64, "hash": "b" * 64, "tensors": tensors}).encode()


def old_torch():
  body = object_pickle([("a", "0", "FloatStorage", 6, 0, (2, 3), (3, 1)), ("b", "0", "FloatStorage", 6, 2, (2,), (2,)),
                        ("c", "1", "HalfStorage", 3, 0, (3,), (1,))])  # fmt: skip
  return old_stream(body, {"0": np.arange(6, dtype="f4"), "1": np.arange(3, dtype="f2")})


def zips_of_torch():
  number = opcodes_string("step") + numpy_number_pickle("i8", bytes(8))[2:-1] + pickle.SETITEM
  body = object_pickle([("a", "0", "FloatStorage", 6, 0, (2, 3), (3, 1)), ("b", "0", "FloatStorage", 6, 2, (2,), (2,))])
  both = new_zip(body[:-1] + number + pickle.STOP, {"0": np.arange(6, dtype="f4")})
  return [torch_zip(ARRAYS), torch_zip(ARRAYS, wrapper="state_dict"), both]


# --- records


def read_records(module, suffix="", **options):
  """Indexes a file and reads all of each record."""

  def read(path):
    for source in module.open_files([path], **options):
      for row in range(len(source)):
        source.fields(row)
        for modality in source.modalities:
          if modality != "text" and source.has(row, modality):
            source.read(row, modality)

  return read


def json_lines():
  rows = [{"id": i, "text": ["a dog", "naïve"], "image": f"{i}.png", "label": "x", "split": "train"} for i in range(4)]
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_file():
  return b'id,text,label,split\n1,"a, ""dog""",x,train\n2,cat,y,val\n3,"two\nlines",x,test\n'


def arrow_table():
  import pyarrow as pa

  rows = [{"id": f"r{i}", "text": "a dog", "label": i % 2, "image": {"bytes": b"png", "path": None}} for i in range(6)]
  return pa.Table.from_pylist(rows)


def read_description(path):
  """A Parquet file whose description is damaged; the rest is whole."""
  import pyarrow.parquet as pq

  table = arrow_table().replace_schema_metadata({b"huggingface": path.read_bytes()})
  file = path.with_name("described.parquet")
  pq.write_table(table, file)
  read_records(parquet)(file)


def description():
  features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
  return json.dumps({"info": {"features": features}}).encode()


def parquet_file(**options):
  import pyarrow.parquet as pq

  return saved(lambda out: pq.write_table(arrow_table(), out, **options))


def tar_file():
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
    for i in range(3):
      for ending, content in (("png", b"picture"), ("txt", b"a dog"), ("json", b'{"label": "x"}')):
        info = tarfile.TarInfo(f"{'long/' * 30 if i == 2 else ''}00{i}.{ending}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  return out.getvalue()


def array_record_file(index=True):
  import pathlib
  import tempfile

  from array_record.python.array_record_module import ArrayRecordWriter

  from codebind_jax.data.index import IndexBuilder

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "a.array_record"
    writer, builder = ArrayRecordWriter(str(path), "group_size:1"), IndexBuilder()
    for i in range(3):
      fields = {"id": f"r{i}", "label": "x", "text": ["a dog"]}
      writer.write(array_record.encode(fields, {"image": b"picture"}))
      builder.add(f"r{i}", ["text", "image"], "x", None)
    if index:
      writer.write(array_record.encode_index(builder.build(), "plan"))
    writer.close()
    return path.read_bytes()


def read_array_record(path):
  try:
    read_records(array_record)(path)
  finally:
    array_record.close()


def arrow_stream():
  import pyarrow as pa

  out = io.BytesIO()
  with pa.ipc.new_stream(out, arrow_table().schema) as writer:
    writer.write_table(arrow_table())
  return out.getvalue()


def read_saved(path):
  """A folder of `save_to_disk` whose Arrow file is damaged."""
  path.with_name("state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}], "_split": "train"}))
  read_records(hugging_face)(path.parent)


def read_state(path):
  """A folder of `save_to_disk` whose description is damaged."""
  path.with_name("data.arrow").write_bytes(arrow_stream())
  read_records(hugging_face)(path.parent)


def read_metadata(path):
  """A folder of files beside a metadata file."""
  path.with_name("a.png").write_bytes(picture("png"))
  read_records(hugging_face)(path.parent)


def read_class_folder(path):
  """A class folder with a file of a name that is damaged."""
  name = path.read_bytes()[:200].replace(b"/", b"").replace(b"\0", b"").strip(b".") or b"x"
  import os
  import shutil

  root = path.with_name("classes")
  shutil.rmtree(root, ignore_errors=True)
  place = root / "dog"
  place.mkdir(parents=True)
  try:
    with open(os.fsencode(place) + b"/" + name, "wb") as file:
      file.write(b"x")
  except OSError:
    return
  try:
    read_records(folder)(root)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


# --- archives of packages


def read_archive(path):
  return archives.read_members(path, ["a/b.txt", "c.svg"])


def read_rcc(content):
  try:
    return archives.read_rcc(content)
  except ValueError as error:
    raise ValueError(f"rcc: {error}") from error  # its callers name the package


FILES = {"a/b.txt": b"text " * 20, "c.svg": b"<svg/>"}


def _media(modality, seeds, called=""):
  return Reader(lambda content: transforms.of(modality).read(content), seeds, called=called or f"{modality} bytes")


def _records(module, seeds, name, **options):
  return Reader(read_records(module, **options), seeds, name)


READERS = {
  **fuzz_kept.READERS,
  **{kind: _media("image", seeds) for kind, seeds in PICTURES.items()},
  "animations": _media("video", lambda: [animation("gif"), animation("webp"), animation("png")]),
  "films mp4": _media("video", lambda: [film("mp4", "mpeg4")]),
  "films webm": _media("video", lambda: [film("webm", "libvpx")]),
  "films avi": _media("video", lambda: [film("avi", "mjpeg"), film("avi", "mpeg4")]),
  "wav": _media("audio", lambda: [sound("WAV"), sound("WAV", 2, subtype="FLOAT")]),
  "flac": _media("audio", lambda: [sound("FLAC"), sound("FLAC", 2)]),
  "ogg": _media("audio", lambda: [sound("OGG"), sound("OGG", subtype="OPUS")]),
  "mp3": _media("audio", lambda: [sound("MP3")]),
  "edf": _media("eeg", lambda: [edf(), edf(bdf=True)]),
  "eeg npy": _media("eeg", lambda: [npy(RNG.normal(size=(3, 20)) * 20)]),
  "depth": _media("depth", lambda: [picture("png", PIXELS[..., 0].astype(np.uint16) * 20), float_tiff(),
                                    picture("tiff", PIXELS[..., 0].astype(np.float32) / 9 + 0.1)]),
  "depth arrays": _media("depth", lambda: [npy(np.ones((4, 5), np.float32) * 1.5),
                                           saved(np.savez_compressed, depth=np.full((9, 9), 700, np.uint16)),
                                           saved(np.savez, disparity=np.full((4, 4), 9.0), scale=np.float64(30.0))]),
  "thermal": _media("thermal", lambda: [picture("png", PIXELS[..., 0].astype(np.uint16) + 29000), float_tiff(),
                                        npy(np.full((4, 5), 30.0)), picture("png", PIXELS[..., 0])]),
  "tactile": _media("tactile", lambda: [picture("png"), picture("jpeg")]),
  **{f"points {kind}": _media("points", seeds) for kind, seeds in POINTS.items()},
  "texts": Reader(read_text, texts, called="text"),
  "torch zip": Reader(read_weights, zips_of_torch, "net.pth"),
  "torch stream": Reader(read_weights, lambda: [old_torch()], "old.pth"),
  "safetensors": Reader(read_weights, lambda: [safetensors()], "model.safetensors"),
  "npz weights": Reader(
    read_weights, lambda: [saved(np.savez, **ARRAYS), saved(np.savez_compressed, **ARRAYS)], "a.npz"),
  "shards' index": Reader(read_index, lambda: [
    json.dumps({"weight_map": {"w": "a.safetensors", "b": "a.safetensors"}}).encode()], "m.safetensors.index.json"),
  "shapes": Reader(read_shapes, lambda: [shapes_file()], "model.safetensors.shapes.json"),
  "wheel": Reader(read_wheel, lambda: [wheel({"a/b.bin": b"weights" * 9, "c": b"x"})], "a.whl"),
  "jsonl": _records(jsonl, lambda: [json_lines()], "m.jsonl"),
  "csv": _records(table, lambda: [csv_file()], "m.csv"),
  "parquet": _records(parquet, lambda: [parquet_file(), parquet_file(compression="zstd", use_dictionary=False)],
                      "m.parquet"),
  "tar": _records(tar, lambda: [tar_file()], "m.tar"),
  "array_record": Reader(read_array_record, lambda: [array_record_file(), array_record_file(False)], "m.array_record"),
  "saved data set": Reader(read_saved, lambda: [arrow_stream()], "data.arrow", "saved data set"),
  "parquet description": Reader(read_description, lambda: [description()], "about.json", "described.parquet",
                                json_mutant),
  "saved state": Reader(
    read_state, lambda: [json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": "train"}).encode()],
    "state.json", "saved state", json_mutant),
  "metadata": Reader(read_metadata, lambda: [b'{"file_name": "a.png", "text": "a dog"}\n'], "metadata.jsonl",
                     "metadata", json_mutant),
  "class folder": Reader(read_class_folder, lambda: [b"picture.png", b"a.b.jpg"], "names"),
  "package tgz": Reader(read_archive, lambda: [tgz(FILES)], "a.tgz"),
  "package deb": Reader(read_archive, lambda: [deb(FILES)], "a.deb"),
  "package whl": Reader(read_archive, lambda: [wheel(FILES)], "a.whl"),
  "package rcc": Reader(read_rcc, lambda: [rcc({"a.svg": (b"plain", "plain"), "b": (b"zip" * 50, "zlib"),
                                                 "c": (b"std" * 50, "zstd")})], called="rcc"),
}  # fmt: skip
