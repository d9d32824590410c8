"""Tiny packages made on the spot, in the formats that the real ones have, and stand-ins for the three clients."""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from codebind_jax.data.worlds import fetch, names, store
from codebind_jax.data.worlds.source import WorldSource


def tgz(files: dict[str, bytes]) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as archive:
    _add(archive, files)
  return gzip.compress(out.getvalue(), mtime=0)


def wheel(files: dict[str, bytes]) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in files.items():
      archive.writestr(name, data)
  return out.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as archive:
    _add(archive, {f"./{name}": data for name, data in files.items()})
  members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(out.getvalue())}
  return b"!<arch>\n" + b"".join(
      f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
      for name, data in members.items())


def _add(archive: tarfile.TarFile, files: dict[str, bytes]) -> None:
  for name, data in files.items():
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def rcc(files: dict[str, tuple[bytes, str]], version: int = 3) -> bytes:
  """A Qt resource file with one folder "top" holding files: name -> (content, "plain" | "zlib" | "zstd")."""
  names, payload, tree = b"", b"", []

  def name_offset(name: str) -> int:
    nonlocal names
    offset = len(names)
    names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    return offset

  tail = b"\0" * (8 if version >= 2 else 0)
  tree.append(struct.pack(">IHII", 0, 2, 1, 1) + tail)
  tree.append(struct.pack(">IHII", name_offset("top"), 2, len(files), 2) + tail)
  for name, (content, packing) in files.items():
    flags, body = 0, content
    if packing == "zlib":
      flags, body = 1, struct.pack(">I", len(content)) + zlib.compress(content)
    if packing == "zstd":
      import zstandard

      flags, body = 4, zstandard.ZstdCompressor().compress(content)
    tree.append(struct.pack(">IHHHI", name_offset(name), flags, 0, 0, len(payload)) + tail)
    payload += struct.pack(">I", len(body)) + body
  rows = b"".join(tree)
  data_at = 20 + len(rows)
  return b"qres" + struct.pack(">4I", version, 20, data_at, data_at + len(payload)) + rows + payload + names


def png(colour: tuple[int, ...], size: tuple[int, int] = (8, 8)) -> bytes:
  out = io.BytesIO()
  pixels = np.full((size[1], size[0], len(colour)), colour, np.uint8)
  Image.fromarray(pixels).save(out, "png")
  return out.getvalue()


def svg(colour: str) -> bytes:
  return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="8" height="8">'
          f'<rect x="2" y="2" width="4" height="4" fill="{colour}"/></svg>').encode()


def package(
    package_id: str, kind: str, file: str, data: bytes, *, name: str = "", version: str = "1.0"
) -> fetch.Package:
  return fetch.Package(id=package_id, kind=kind, name=name or package_id, version=version, file=file, bytes=len(data),
                       sha256=hashlib.sha256(data).hexdigest(), profiles=("small",), world="icons",
                       licence=f"licence of {package_id}", attribution=f"maker of {package_id}")


def put(root: Path, one: fetch.Package, data: bytes) -> Path:
  """Places an archive where a fetched one would lie."""
  path = root / "archives" / one.sha256 / one.file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


def recording(root: Path) -> tuple[dict, fetch.Package]:
  """(The table, the fetched package) of a recording of six epochs, of which the world `evoked` is built."""
  conditions = {"audio/left": "a tone in the left ear", "visual/right": "a checkerboard in the right visual field"}
  lines = ["Label,Condition,Time,EEG 001,MEG 9,EEG 002"]
  for label in range(6):
    lines += [f"{label}.0,x,{t / 150},{(label + t) * 1e-6},7,{-t * 1e-6}" for t in range(4)]
  content = ("\n".join(lines) + "\n").encode()
  inner = "neurokit2-0.2.13/studies/erp_gam/data.csv"
  table = {"inner": inner, "sha1": hashlib.sha1(content).hexdigest(), "channels": ["EEG 001", "EEG 002"],
           "conditions": conditions, "epochs": [
               {"label": i, "condition": list(conditions)[i % 2], "split": split}
               for i, split in enumerate(["train", "train", "val", "val", "test", "test"])]}
  data = tgz({inner: content})
  one = package("neurokit2", "pip-sdist", "neurokit2.tar.gz", data)
  put(root, one, data)
  return table, one


def small_world(root: Path, rows: int = 6) -> Path:
  """A world of two splits with pictures and arrays."""
  import tensorflow_datasets as tfds

  def made(split):
    for n in range(rows):
      yield f"{split}{n}", {"id": f"{split}{n}", "label": f"l{n % 2}", "texts": [f"text {n}", "ä"],
                            "image": png((n, 2, 3)), "eeg": store.encode(np.full((2, 3), n, np.float32))}

  features = lambda: {"id": tfds.features.Text(), "label": tfds.features.Text(), "image": store.blob(),
                      "texts": tfds.features.Sequence(tfds.features.Text()), "eeg": store.blob()}
  return store.build(
      root, "toy", "small", "1.0.0", arrays=("image", "eeg"), features=features, need_bytes=0,
      splits={split: lambda split=split: made(split) for split in ("train", "test")},
      finish=lambda: ({"tables": {}, "splits": {"train": rows, "test": rows}}, "by nobody\n"))


def read_world(folder: Path) -> dict:
  """All that is read of a world."""
  index = store.read_index(folder)
  found = {"manifest": store.read_manifest(folder), "index": index, "is": store.fingerprint(folder)}
  for split in index:
    with contextlib.closing(WorldSource(folder, split)) as source:
      found[split] = [dict(row) for row in source]
  return found


def unseen_names() -> set[str]:
  """Second reading of rule 8: slugs of labels of unseen concepts, the concepts themselves and all of their aliases."""
  alias = names.table("aliases")["alias"]
  unseen = {c for c, v in names.concepts().items() if v["split"] in ("val", "test")}
  labels = {names.slug(names.concepts()[c]["label"]) for c in unseen}
  return unseen | labels | {a for a, c in alias.items() if c in unseen}


class FakeClients:
  """Stand-ins for npm, apt-get and `python -m pip`: they note how they were called and hand out files from a shelf."""

  def __init__(self, folder: Path, monkeypatch):
    self.folder = folder
    self.shelf = folder / "shelf"
    self.shelf.mkdir(parents=True)
    for client in ("npm", "apt-get", "python"):
      self._script(client)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(fetch, "_PYTHON", str(folder / "python"))

  def _script(self, client: str) -> None:
    code = f"""#!{sys.executable}
import json, os, shutil, sys, time
args, shelf = sys.argv[1:], {str(self.shelf)!r}
with open({str(self.folder / 'calls.jsonl')!r}, "a") as log:
  log.write(json.dumps([{client!r}, os.getpid(), args]) + "\\n")
if os.path.exists({str(self.folder / client)!r} + ".says"):
  sys.stderr.write(open({str(self.folder / client)!r} + ".says").read())
  sys.exit(1)
if os.path.exists({str(self.folder / client)!r} + ".hangs"):
  time.sleep(600)
for wanted in args:
  for key, name in json.load(open(shelf + "/index.json")).items():
    if key == wanted:
      shutil.copy(shelf + "/" + name, name)
"""
    path = self.folder / client
    path.write_text(code)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def offer(self, wanted: str, file: str, data: bytes) -> None:
    """Lets the client that is asked for `wanted` leave `file` in its folder."""
    index = self.shelf / "index.json"
    known = json.loads(index.read_text()) if index.exists() else {}
    index.write_text(json.dumps(known | {wanted: file}))
    (self.shelf / file).write_bytes(data)

  def says(self, client: str, message: str) -> None:
    (self.folder / f"{client}.says").write_text(message)

  def hangs(self, client: str) -> None:
    (self.folder / f"{client}.hangs").write_text("")

  @property
  def calls(self) -> list[tuple[str, int, list[str]]]:
    log = self.folder / "calls.jsonl"
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
