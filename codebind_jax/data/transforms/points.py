"""Point clouds and meshes: .npy, .ply, .obj, .off, .stl, .glb, .pcd, .xyz, or an array, to coordinates and colours."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from codebind_jax.data import pcd
from codebind_jax.data.numpy_files import load_npy
from codebind_jax.data.reading import file_errors, name_of, remark, unmasked, whole_file

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "points-3"
SAMPLES = 1024
BYTES = 1 << 28  # of a file
FAR = 64.0  # times its size from the origin, float32 has a thousandth of a thousandth of a cloud's size left
SIZES = (1e-12, 1e12)
ALLOWED = ".npy, .ply, .obj, .off, .stl, .glb, .pcd, and tables .xyz, .txt, .csv, .pts, .asc"
_TABLES = (".xyz", ".txt", ".csv", ".pts", ".asc")
_OFF = re.compile(rb"\s*(?:#[^\n]*\n\s*)*(\w*?)off(?=[\s\d#])", re.IGNORECASE)
# Beginnings of formats that are not read -> what they are.
_OTHER = {
  b"PK\x03\x04": "a zip archive (.npz or .3mf); of an .npz save the one array with numpy.save",
  b"LASF": "a LAS or LAZ file; save it as .pcd or .ply, as with PDAL", b"ASTM-E57": "an E57 file; save it as .ply",
  b"ISO-10303": "a STEP file; save it as .stl or .obj", b"Kaydara FBX": "an FBX file; save it as .glb",
  b"BLENDER": "a Blender file; save it as .glb", b"{": "glTF as text, which refers to other "
  "files; save it as .glb", b"<?xml": "XML (.dae or .x3d); save it as .glb",
}  # fmt: skip
_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))


def read(value: Any) -> Float32[np.ndarray, "n c"]:
  """Coordinates [n, 3], or [n, 6] with RGB from 0 to 1 after them; unit and axes are the file's.

  The surface of a mesh is sampled at 1,024 points, the same at every call; a file of vertices alone is taken as it is.
  The origin is the file's, unless the cloud lies more than 64 times its size away, as in map coordinates, of which
  float32 would keep half metres: then it is moved to the middle of the cloud, and it is said.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape, values that are not finite or colours out of
      range, or if all points coincide.
  """
  name = name_of(value, "points")
  if isinstance(value, (str, Path, bytes)):
    with file_errors(name, f"a readable cloud or mesh; allowed: {ALLOWED}"):
      content = whole_file(value, BYTES)
      if content[:6] == b"\x93NUMPY":
        return _checked(load_npy(content, name), name)
      return _checked(_from_file(content, name, "" if isinstance(value, bytes) else Path(value).suffix.lower()), name)
  if not hasattr(value, "__array__"):
    raise ValueError(f"points: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(unmasked(value, "points"), "points")


def _from_file(content: bytes, name: str, ending: str) -> np.ndarray:
  content = content.removeprefix(b"\xef\xbb\xbf")
  for beginning, what in _OTHER.items():
    if content.startswith(beginning):
      raise ValueError(what)
  if not content.strip():
    raise ValueError("the file is empty")
  if pcd.is_pcd(content):
    return pcd.read(content, name)
  if content[:4].lower() in (b"ply\n", b"ply\r"):
    return _from_mesh(_plain_ply(content), "ply", name)
  if found := _OFF.match(content):
    variant, content = found[1].upper(), content[found.end() :]
    if variant not in (b"", b"C", b"N", b"CN") or content.lstrip(b" \t")[:6].upper() == b"BINARY":
      raise ValueError(f"an OFF file of the kind {found[0].split()[-1].decode('latin-1')}, or binary; allowed: OFF, "
                       "COFF and NOFF as text")  # fmt: skip
    content = re.sub(rb"#[^\n]*", b"", content)
    return _from_mesh(b"OFF" + _in_lines(content, {b"": 3, b"N": 6}.get(variant)), "off", name)
  if content[:4] == b"glTF":
    size = int.from_bytes(content[8:12], "little")
    if size > len(content):
      raise ValueError(f"cut off, its header says {size} bytes and there are {len(content)}")
    return _from_mesh(content, "glb", name)
  triangles = int.from_bytes(content[80:84], "little")
  whole = len(content) == 84 + 50 * triangles
  # Of files that are not called .stl, one whose second line is a facet.
  lines = rb"[^\0]*?" if ending == ".stl" else rb"\s*"
  text = not whole and bool(re.match(rb"\s*solid\b[^\n]*\n" + lines + rb"\bfacet\b", content[:4096], re.IGNORECASE))
  if ending == ".stl" or whole or text:
    _check_stl(content, triangles, text)
    return _from_mesh(content, "stl", name)
  if pcd.is_table(content) or ending in _TABLES:
    return pcd.read_table(content, name)
  if not re.search(rb"^\s*v\s", content, re.MULTILINE):
    raise ValueError("a kind of file that is not known")
  if not re.search(rb"^\s*f\s", content, re.MULTILINE):
    return _from_vertices(content, name)
  return _from_mesh(content, "obj", name)


def _from_vertices(content: bytes, name: str) -> np.ndarray:
  """Of an OBJ file without faces: x y z, and RGB from 0 to 1 or to 255 where all vertices have them."""
  rows = [line.split() for line in re.findall(rb"^\s*v\s+([^\n#]*)", content, re.MULTILINE)]
  widths = sorted({len(row) for row in rows})
  if widths[0] < 3 or widths[-1] > 7 or 5 in widths:
    raise ValueError(f"vertices of {', '.join(map(str, widths))} numbers; allowed: 3 (x y z), 4, or 6 (x y z r g b)")
  if widths != [6]:
    if widths[-1] > 4:
      remark("colours of points", f"{name}: the colours of its vertices, which have {' or '.join(map(str, widths))} "
             "numbers, are left out; 6 each are needed (x y z r g b)")  # fmt: skip
    return np.array([row[:3] for row in rows], np.float64)
  out = np.array(rows, np.float64)
  if out[:, 3:].max() > 1:
    out[:, 3:] /= 255.0
  return out


def _from_mesh(content: bytes, kind: str, name: str) -> np.ndarray:
  import trimesh

  shape = trimesh.load(io.BytesIO(content), file_type=kind, process=False)
  raw = shape.metadata.get("_ply_raw", {}).get("vertex") if kind == "ply" else None
  for element, part in (shape.metadata["_ply_raw"] if raw else {}).items():
    there = part.get("data", ())
    there = len(there) if isinstance(there, np.ndarray) or not there else len(next(iter(there.values())))
    if there < part["length"] and element in ("vertex", "face"):
      raise ValueError(f"cut off, its header says {part['length']} of element {element} and there are {there}")
  if isinstance(shape, trimesh.Scene):
    shape = _of_scene(shape, name)
  vertices, faces = np.asarray(shape.vertices), getattr(shape, "faces", ())
  if not len(vertices):
    raise ValueError("no points in it")
  if len(faces):
    if loose := len(vertices) - len(np.unique(faces)):
      remark("points beside meshes", f"{name}: {loose} of its {len(vertices)} vertices belong to no face, left out")
    return np.asarray(trimesh.sample.sample_surface(shape, SAMPLES, seed=0)[0])
  colours = _ply_colours(raw) if raw else getattr(shape, "colors", None)
  if colours is not None and len(colours) == len(vertices):
    return np.concatenate([vertices, colours if raw else np.asarray(colours)[:, :3] / 255.0], axis=1)
  return vertices


def _of_scene(scene: Any, name: str) -> Any:
  """The meshes of a scene as one, or its point clouds where it has none; parts that are neither taken are said."""
  import trimesh

  parts = [(scene.geometry[part], where) for where, part in map(scene.graph.get, scene.graph.nodes_geometry)]
  clouds = [(part, where) for part, where in parts if isinstance(part, trimesh.PointCloud)]
  meshes = sum(isinstance(part, trimesh.Trimesh) for part, _ in parts)
  if left := len(parts) - (meshes or len(clouds)):
    remark("parts of scenes", f"{name}: {left} of its {len(parts)} parts are no {'mesh' if meshes else 'points'}, as "
           f"the others are ({len(clouds)} clouds, {meshes} meshes), and left out")  # fmt: skip
  if meshes or not clouds:
    return scene.to_geometry()
  colours = [part.colors for part, _ in clouds]
  some = [len(colour) == len(part.vertices) for colour, (part, _) in zip(colours, clouds)]
  if any(some) and not all(some):
    remark("colours of points", f"{name}: some of its clouds alone have colours, which are left out")
  vertices = np.concatenate([trimesh.transform_points(part.vertices, where) for part, where in clouds])
  return trimesh.PointCloud(vertices, np.concatenate(colours) if all(some) else None)


def _plain_ply(content: bytes) -> bytes:
  """A PLY file without comments and blank lines, and with names of properties in small letters.

  Raises:
    ValueError: if it is cut off in its header or, as text, in its lines, or if it has triangle strips.
  """
  end = next(end for end in (b"\r\n", b"\n", b"\r") if end in content[3:5])
  found = re.search(rb"(?<=[\r\n])end_header[ \t]*" + end, content)
  if not found:
    raise ValueError("cut off or damaged in its header, which ends with end_header")
  lines = [line.split() for line in content[: found.start()].decode("latin-1").split(end.decode())]
  lines = [line for line in lines if line and line[0] not in ("comment", "obj_info")]
  form = next((line[1] for line in lines if line[0] == "format" and len(line) == 3), "")
  if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
    raise ValueError(f"format {form!r} in its header; allowed: ascii, binary_little_endian, binary_big_endian")
  lines = [lines[0], ["format", form, "1.0"], *(line for line in lines[1:] if line[0] != "format")]
  elements: list[tuple[str, int, list[list[str]]]] = []
  for line in lines[2:]:
    if line[0] == "element" and len(line) == 3 and line[2].isdigit():
      elements.append((line[1], int(line[2]), []))
    elif line[0] == "property" and len(line) in (3, 5) and elements:
      line[-1] = line[-1].lower()
      elements[-1][2].append(line)
    else:
      raise ValueError(f"{' '.join(line)!r} in its header; a damaged line")
  if any(element == "tristrips" and count for element, count, _ in elements):
    raise ValueError("its surface is triangle strips (tristrips); save it with faces")
  vertex = [line[-1] for element, _, properties in elements if element == "vertex" for line in properties]
  if missing := [axis for axis in "xyz" if axis not in vertex]:
    raise ValueError(f"its vertices have no {missing[0]}; they have {', '.join(vertex) or 'nothing'}")
  body = content[found.end() :]
  if form == "ascii":
    rows = [row for row in body.splitlines() if row.strip()]
    _check_rows(rows, elements)
    body = b"\n".join(rows) + b"\n"
  return "\n".join([*map(" ".join, lines), "end_header\n"]).encode("latin-1") + body


def _check_rows(rows: list[bytes], elements: list[tuple[str, int, list[list[str]]]]) -> None:
  """Refuses a PLY file of text that has fewer lines than its header says, or numbers missing in the last one."""
  at = 0
  for element, count, properties in elements:
    there = min(count, len(rows) - at)
    if there < count:
      raise ValueError(f"cut off, its header says {count} of element {element} and there are {there}")
    at += count
    if not count or at < len(rows):
      continue
    words, place = rows[-1].split(), 0
    for line in properties:
      place += 1 + (int(words[place]) if line[1] == "list" and place < len(words) else 0)
    if place > len(words):
      raise ValueError(f"cut off, its last line has {len(words)} numbers and {place} are needed")


def _check_stl(content: bytes, triangles: int, text: bool) -> None:
  """Refuses an STL file that is cut off, or longer than its header says."""
  if text:
    named = re.compile(rb"^\s*(end)?solid\b[^\n]*", re.MULTILINE | re.IGNORECASE)
    solids = named.findall(content)
    facets = re.findall(rb"\b(end)?facet\b", named.sub(b"", content), re.IGNORECASE)
    for what, found in (("facets", facets), ("solids", solids)):
      if found.count(b"") != len(found) / 2:
        begun = found.count(b"")
        raise ValueError(f"cut off or damaged, {begun} {what} begin and {len(found) - begun} end")
  elif len(content) != 84 + 50 * triangles:
    if re.match(rb"\s*solid\b", content, re.IGNORECASE) and b"\0" not in content:
      raise ValueError("cut off or damaged, it begins as text (solid) and has no facet")
    raise ValueError(f"cut off or damaged, its header says {triangles} triangles, which are {84 + 50 * triangles} "
                     f"bytes, and there are {len(content)}")  # fmt: skip


def _in_lines(content: bytes, width: int | None) -> bytes:
  """An OFF file's counts, vertices and faces, each in a line of its own.

  Args:
    content: behind the word OFF, without comments.
    width: numbers of a vertex, if they are known: then a line may hold several vertices or faces.

  Raises:
    ValueError: if there are fewer vertices and faces than the counts say.
  """
  lines = [line for line in content.splitlines() if line.strip()]
  vertices, faces = (int(word) for word in (lines[0].split() if lines else (0, 0))[:2])
  if len(lines) >= 1 + vertices + faces:
    return content
  words = content.split()
  at = len(lines[0].split()) if lines else 0
  at = at if at in (2, 3) else 3
  out = [words[:at]]
  for number in range(vertices + faces if width else 0):
    size = width if number < vertices else 1 + int(words[at]) if at < len(words) else 1
    out.append(words[at : at + size])
    if len(out[-1]) < size:
      break
    at += size
  else:
    if width and at == len(words):
      return b"\n" + b"\n".join(map(b" ".join, out)) + b"\n"
  raise ValueError(f"cut off, it says {vertices} vertices and {faces} faces and has {len(lines) - 1} lines of them")


def _ply_colours(vertex: Any) -> np.ndarray | None:
  """RGB from 0 to 1 of a PLY file's vertices: 1 is the largest value of the type, and of floats 1 or 255."""
  kinds, data = vertex["properties"], vertex["data"]
  found = next((colours for colours in _COLOURS if set(colours) <= set(kinds)), None)
  if found is None:
    return None
  columns = np.stack([np.asarray(data[colour]).reshape(-1) for colour in found], axis=1)
  kind = np.dtype(kinds[found[0]])
  if kind.kind == "f" or kind.itemsize > 2:  # also integers that nobody fills
    return columns / (1.0 if kind.kind == "f" and columns.max() <= 1.0 else 255.0)
  return columns / float(np.iinfo(kind).max)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if array.ndim != 2 or array.shape[-1] not in (3, 6) or not len(array) or not numbers:
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are numbers [n, 3] or [n, 6]")
  if not np.isfinite(array).all():
    wrong = int((~np.isfinite(array)).any(axis=1).sum())
    raise ValueError(f"{name}: has values that are not finite, in {wrong} of {len(array)} points")
  if array.shape[-1] == 6 and not (0 <= array[:, 3:].min() and array[:, 3:].max() <= 1):
    raise ValueError(f"{name}: colours from {array[:, 3:].min():g} to {array[:, 3:].max():g}, allowed are 0 to 1")
  low, high = array[:, :3].min(axis=0).astype(np.float64), array[:, :3].max(axis=0).astype(np.float64)
  size = float((high - low).max())
  if not size:
    raise ValueError(f"{name}: all {len(array)} points are one")
  if not SIZES[0] <= size <= SIZES[1]:
    raise ValueError(f"{name}: a cloud of size {size:g}; allowed are {SIZES[0]:g} to {SIZES[1]:g}")
  if max(np.abs(low).max(), np.abs(high).max()) <= FAR * size:
    return array.astype(np.float32)
  middle = (low + high) / 2
  step = float(np.spacing(np.abs(middle).max().astype(array.dtype))) if array.dtype.kind == "f" else 0.0
  lost = f"; its numbers are {array.dtype} and have steps of {step:g} there" if step > 1e-4 * size else ""
  remark("far origins", f"{name}: {size:.3g} large and far from its origin, which is moved to the middle, "
         f"({', '.join(f'{axis:.10g}' for axis in middle)}){lost}")  # fmt: skip
  moved = array.astype(np.float64)
  moved[:, :3] -= middle
  return moved.astype(np.float32)
