"""Clouds and meshes as people have them: map coordinates, headers of all kinds, formats, damaged and lying files."""

import io
import struct

import numpy as np
import pytest
import trimesh

from codebind_jax.data import pcd
from codebind_jax.data.preparation.points import Cloud, Groups
from codebind_jax.data.transforms import points

RNG = np.random.default_rng(0)
P = RNG.normal(size=(40, 3))
C = RNG.integers(0, 256, (40, 3))
MAP = np.array([500_123.4, 4_649_876.5, 312.0])
CUBE = "".join(f"{a} {b} {c}\n" for a in (0, 1) for b in (0, 1) for c in (0, 1))
FACES = "4 0 2 3 1\n4 4 5 7 6\n4 0 1 5 4\n4 2 6 7 3\n4 0 4 6 2\n4 1 3 7 5\n"
CODES = {"float": "f4", "double": "f8", "uchar": "u1", "ushort": "u2", "int": "i4"}


NAMES = ("x", "y", "z", "red", "green", "blue")


def ply(columns, kinds, names=NAMES, form="binary_little_endian", end="\n", count=None):
  rows = len(columns[0])
  head = ["ply", f"format {form} 1.0", f"element vertex {rows if count is None else count}"]
  head += [f"property {kind} {name}" for kind, name in zip(kinds, names)] + ["end_header", ""]
  if form == "ascii":
    return end.join([*head[:-1], *(" ".join(f"{x:.9g}" for x in row) for row in zip(*columns)), ""]).encode()
  order = "<" if "little" in form else ">"
  body = np.zeros(rows, [(name, order + CODES[kind]) for kind, name in zip(kinds, names)])
  for name, column in zip(names, columns):
    body[name] = column
  return end.join(head).encode() + body.tobytes()


XYZ = list(P.T)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(("kinds", "scale"), [
  (["float"] * 3 + ["uchar"] * 3, 1), (["double"] * 3 + ["uchar"] * 3, 1), (["float"] * 6, 1 / 255), (["float"] * 6, 1),
  (["float"] * 3 + ["ushort"] * 3, 257), (["double"] * 6, 1 / 255), (["float"] * 3 + ["int"] * 3, 1)])  # fmt: skip
def test_ply_of_every_type(form, kinds, scale):
  for end in ("\n", "\r\n"):
    for names in (NAMES, ("x", "y", "z", "r", "g", "b")):
      got = points.read(ply([*XYZ, *(C.T * scale)], kinds, names, form, end))
      np.testing.assert_allclose(got, np.c_[P, C / 255], atol=1e-5)


@pytest.mark.parametrize("head", ["OFF8 6 12\n", "OFF 8 6 12\n", "OFF\n# by hand\n\n8 6 12\n", "OFF\r\n8 6 12\r\n",
                                  "# by hand\nOFF\n8 6 12\n", "off\n8 6 12\n", "\ufeffOFF\n8 6 12\n", "NOFF\n8 6 12\n",
                                  "\n\n# off\n#\ncoff\n8 6 12 # counts\n"])  # fmt: skip
def test_off_headers(head):
  want = points.read(("OFF\n8 6 12\n" + CUBE + FACES).encode())
  assert want.shape == (1024, 3) and np.allclose(np.ptp(want, axis=0), 1, atol=0.02)
  np.testing.assert_array_equal(points.read((head + CUBE + FACES).encode()), want)


def test_the_origin_is_off_before_float32_is_made(tmp_path, caplog):
  egg = P / np.linalg.norm(P, axis=1, keepdims=True) * [1.0, 1.6, 1.0]
  for scale in (1.0, 0.05):
    far = scale * egg + MAP
    np.save(tmp_path / "utm.npy", far)
    (tmp_path / "utm.ply").write_bytes(ply(list(far.T), ["double"] * 3, ("x", "y", "z")))
    (tmp_path / "utm.xyz").write_text("".join(f"{x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in far))
    for value in (far, tmp_path / "utm.npy", tmp_path / "utm.ply", tmp_path / "utm.xyz"):
      got = points.read(value).astype(np.float64)
      np.testing.assert_allclose(got - got.mean(axis=0), scale * (egg - egg.mean(axis=0)), atol=2e-6)
    assert "utm.ply: 2.9 large" in caplog.text
  assert "far from its origin, which is moved to the middle" in caplog.text and "steps" not in caplog.text
  mesh = "OFF\n8 6 12\n" + "".join(f"{x} {y} {z}\n" for x, y, z in np.loadtxt(CUBE.splitlines()) + MAP) + FACES
  assert np.allclose(np.ptp(points.read(mesh.encode()), axis=0), 1, atol=0.02)
  points.read((egg + MAP).astype(np.float32))
  assert "its numbers are float32 and have steps of 0.5 there" in caplog.text


def test_near_clouds_keep_their_bits(caplog):
  for cloud in (P, P + 50, P.astype(np.float32), (100 * P).astype(np.int64), np.c_[P + 40, C / 255]):
    np.testing.assert_array_equal(points.read(cloud), cloud.astype(np.float32))
  assert not caplog.messages


def test_trunks_see_one_cloud_wherever_it_lies():
  for prepare in (Groups(4, 5, True), lambda value: Cloud(64)(points.read(value))):
    np.testing.assert_allclose(prepare(P + MAP), prepare(P), atol=2e-4)


def test_meshes_of_other_formats_are_sampled():
  box = trimesh.creation.box((1, 2, 3))
  for kind in ("stl", "stl_ascii", "glb", "obj", "ply", "off"):
    content = box.export(file_type=kind)
    got = points.read(content if isinstance(content, bytes) else content.encode())
    assert got.shape == (1024, 3), kind
    np.testing.assert_allclose(np.sort(np.ptp(got, axis=0)), [1, 2, 3], atol=0.05, err_msg=kind)
  scene = trimesh.Scene()  # a scene's parts are where its nodes put them
  scene.add_geometry(box)
  scene.add_geometry(box, transform=trimesh.transformations.translation_matrix([5, 0, 0]))
  assert np.allclose(np.ptp(points.read(scene.export(file_type="glb")), axis=0), [6, 2, 3], atol=0.1)


def pcd_file(kind, rgb=True, count=None, extra=b""):
  names, sizes, types = ["x", "y", "z"], [4, 8, 4], ["F", "F", "F"]
  rows = np.zeros(40, [("x", "<f4"), ("y", "<f8"), ("z", "<f4"), *([("rgb", "<u4")] if rgb else [])])
  rows["x"], rows["y"], rows["z"] = P.T
  if rgb:
    names, sizes, types = [*names, "rgb"], [*sizes, 4], [*types, "U"]
    rows["rgb"] = C[:, 0] << 16 | C[:, 1] << 8 | C[:, 2]
  head = ["# .PCD v0.7 - Point Cloud Data file format", "VERSION 0.7", "FIELDS " + " ".join(names)]
  head += ["SIZE " + " ".join(map(str, sizes)), "TYPE " + " ".join(types), "COUNT " + " ".join("1" for _ in names)]
  head += [f"WIDTH {count or 40}", "HEIGHT 1", "VIEWPOINT 0 0 0 1 0 0 0", f"POINTS {count or 40}", f"DATA {kind}", ""]
  if kind == "ascii":
    body = "".join(" ".join(f"{value!r}" for value in row) + "\n" for row in rows.tolist()).encode()
  elif kind == "binary":
    body = rows.tobytes()
  else:
    plain = b"".join(rows[name].tobytes() for name in rows.dtype.names)
    packed = b"".join(bytes([len(part) - 1]) + part for part in (plain[i : i + 32] for i in range(0, len(plain), 32)))
    body = struct.pack("<II", len(packed), len(plain)) + packed
  return "\n".join(head).encode() + body + extra


@pytest.mark.parametrize("kind", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("rgb", [True, False])
def test_pcd(kind, rgb, tmp_path):
  (tmp_path / "a.pcd").write_bytes(pcd_file(kind, rgb))
  np.testing.assert_allclose(points.read(tmp_path / "a.pcd"), np.c_[P, C / 255] if rgb else P, atol=1e-6)
  (tmp_path / "cut.pcd").write_bytes(pcd_file(kind, rgb)[:-50])
  with pytest.raises(ValueError, match=r"cut\.pcd: .*(cut off|compressed|damaged|columns)"):
    points.read(tmp_path / "cut.pcd")
  with pytest.raises(ValueError, match="points bytes: "):
    points.read(pcd_file(kind, rgb, count=2**40))


def test_pcd_of_a_camera_leaves_out_what_gave_no_return_and_says_it(caplog):
  head = "VERSION .7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nWIDTH 3\nHEIGHT 1\nDATA ascii\n"
  colour = float(np.array([0x0000FF80], "<u4").view("<f4")[0])
  got = points.read(f"{head}0 0 0 {colour!r}\nnan nan nan {colour!r}\n1 2 3 {colour!r}\n".encode())
  np.testing.assert_allclose(got, [[0, 0, 0, 0, 1, 128 / 255], [1, 2, 3, 0, 1, 128 / 255]], atol=1e-6)
  assert "1 of 3 points are NaN and left out" in caplog.text


def test_lzf_by_hand():
  # Three literals, then a copy of 6 bytes from 3 back, which overlaps; then one of 2 + 7 + 1 from 1 back.
  assert pcd._unpacked(bytes([2, 97, 98, 99, 4 << 5, 2, 7 << 5, 1, 0]), 19, "a") == b"abcabcabc" + b"c" * 10
  with pytest.raises(ValueError, match="a: its compressed data are damaged"):
    pcd._unpacked(bytes([4 << 5, 2]), 6, "a")


@pytest.mark.parametrize(("text", "want"), [
  ("1 2 3\n4 5 6\n", None), ("1,2,3\n4,5,6", None), ("1; 2; 3\n4; 5; 6\n", None), ("# made\n1 2 3\n\n4 5 6\n", None),
  ("x y z\n1 2 3\n4 5 6\n", None), ("2\n1 2 3\n4 5 6\n", None), ("z,y,x,intensity\n3,2,1,9\n6,5,4,9\n", None),
  ("1 2 3 0.5\n4 5 6 -7\n", None), ("1,2,3,-1,0,0\n4,5,6,0,0,1\n", None),
  ("1 2 3 255 0 51\n4 5 6 0 0 0\n", [[1, 0, 0.2], [0, 0, 0]]),
  ("1 2 3 1 0 0.2\n4 5 6 0 0 0\n", [[1, 0, 0.2], [0, 0, 0]]),
  ("1 2 3 -900 255 0 51\n4 5 6 7 0 0 0\n", [[1, 0, 0.2], [0, 0, 0]]),
  ("//X Y Z R G B\n1 2 3 255 0 51\n4 5 6 0 0 0\n", [[1, 0, 0.2], [0, 0, 0]]),
  ("x y z i red green blue\n1 2 3 9 255 0 51\n4 5 6 9 0 0 0\n", [[1, 0, 0.2], [0, 0, 0]]),
])  # fmt: skip
def test_tables(text, want):
  cloud = np.array([[1, 2, 3], [4, 5, 6]])
  np.testing.assert_allclose(points.read(text.encode()), cloud if want is None else np.c_[cloud, want], atol=1e-6)


def test_obj_colours_of_either_scale_and_those_of_some_alone(caplog):
  line = lambda row: "v " + " ".join(f"{x:.9g}" for x in row) + "\n"
  for scale in (1, 1 / 255):
    got = points.read("".join(map(line, np.c_[P, C * scale])).encode())
    np.testing.assert_allclose(got, np.c_[P, C / 255], atol=1e-6)
  assert not caplog.messages
  some = "".join(line(row if i % 2 else row[:3]) for i, row in enumerate(np.c_[P, C])).encode()
  np.testing.assert_allclose(points.read(some), P, atol=1e-6)
  assert "the colours of its vertices, which have 3 or 6 numbers, are left out" in caplog.text
  with pytest.raises(ValueError, match="vertices of 2 numbers; allowed: 3"):
    points.read(b"v 1 2\nv 3 4\n")


def test_scenes_of_clouds_are_read_and_mixed_ones_say_what_is_left_out(caplog):
  shift = trimesh.transformations.translation_matrix([5, 0, 0])
  for colours in (None, np.c_[C, np.full(40, 255)].astype(np.uint8)):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.PointCloud(P, colours))
    scene.add_geometry(trimesh.PointCloud(2 * P, colours), transform=shift)
    got = points.read(scene.export(file_type="glb"))
    want = np.r_[P, 2 * P + [5, 0, 0]]
    want = want if colours is None else np.c_[want, np.r_[C, C] / 255]
    np.testing.assert_allclose(np.sort(got, axis=0), np.sort(want, axis=0), atol=1e-5)
  assert not caplog.messages
  scene.add_geometry(trimesh.creation.box((1, 2, 3)))
  np.testing.assert_allclose(np.ptp(points.read(scene.export(file_type="glb")), axis=0), [1, 2, 3], atol=0.05)
  assert "2 of its 3 parts are no mesh" in caplog.text


@pytest.mark.parametrize(("names", "kind", "scale"), [
  ("r g b", "U 1", 1), ("red green blue", "F 4", 1), ("r g b", "F 4", 1 / 255), ("r g b", "U 2", 257),
  ("red green blue", "I 4", 1)])  # fmt: skip
def test_pcd_colours_in_fields_of_their_own(names, kind, scale, caplog):
  code, size = kind.split()
  size, code = (f"{value} {value} {value}" for value in (size, code))
  head = f"VERSION .7\nFIELDS x y z {names} intensity\nSIZE 4 4 4 {size} 4\nTYPE F F F {code} F"
  rows = "".join(" ".join(f"{x:.9g}" for x in row) + " 7\n" for row in np.c_[P, C * scale])
  got = points.read(f"{head}\nWIDTH 40\nHEIGHT 1\nDATA ascii\n{rows}".encode())
  np.testing.assert_allclose(got, np.c_[P, C / 255], atol=1e-6)
  assert "fields intensity are left out" in caplog.text


def test_unit_lengths_are_normals_and_no_colours(caplog):
  normals = np.abs(P) / np.linalg.norm(P, axis=1, keepdims=True)
  line = lambda row: " ".join(f"{x:.3f}" for x in row) + "\n"
  np.testing.assert_allclose(points.read("".join(map(line, np.c_[P, normals])).encode()), P, atol=1e-3)
  assert "columns 4, 5, 6 (intensities or normals) are left out" in caplog.text
  assert points.read("".join(map(line, np.c_[P, 0.9 * normals])).encode()).shape == (40, 6)


PLY = ("ply\n{0}format ascii 1.0\n{1}element vertex 3\nproperty float {2}\nproperty float {3}\nproperty float {4}\n"
       "end_header\n0 0 0\n1 0 0\n1 1 0.5\n")  # fmt: skip


@pytest.mark.parametrize("words", [
  ("comment by hand: binary\n", "", *"xyz"), ("", "comment a\n\nobj_info b\n", *"xyz"), ("", "", *"XYZ")])  # fmt: skip
def test_ply_headers(words):
  for end in ("\n", "\r\n", "\r"):
    got = points.read(PLY.format(*words).replace("\n", end).encode())
    np.testing.assert_array_equal(got, [[0, 0, 0], [1, 0, 0], [1, 1, 0.5]])


def test_ply_files_say_what_is_wrong():
  plain = PLY.format("", "", *"xyz")
  strips = "element tristrips 1\nproperty list int int vertex_indices\nend_header"
  for content, message in {
    plain[:70]: "cut off or damaged in its header", plain[:-5]: "cut off, its last line has 2 numbers and 3 are needed",
    plain[:-8]: "cut off, its header says 3 of element vertex and there are 2",
    plain.replace("end_header", strips) + "3 0 1 2\n": r"triangle strips \(tristrips\)",
    plain.replace("float z", "float w"): "its vertices have no z; they have x, y, w",
    plain.replace("ascii", "text"): "format 'text' in its header; allowed: ascii",
    plain.replace("element vertex 3", "element vertex many"): "'element vertex many' in its header",
  }.items():  # fmt: skip
    with pytest.raises(ValueError, match=f"points bytes: .*{message}"):
      points.read(content.encode())


def test_off_files_of_several_vertices_on_a_line_are_read():
  want = points.read(("OFF\n8 6 12\n" + CUBE + FACES).encode())
  one, two = "OFF 8 6 12 " + (CUBE + FACES).replace("\n", " "), "OFF\n8 6 12\n" + CUBE.replace("\n", " ") + "\n" + FACES
  for text in (one, two):
    np.testing.assert_array_equal(points.read(text.encode()), want)
    with pytest.raises(ValueError, match="cut off, it says 8 vertices and 6 faces"):
      points.read(text.rstrip()[:-2].encode())


def test_vertices_of_no_face_are_said_to_be_left_out(caplog):
  text = "OFF\n8 6 12\n" + CUBE + FACES
  want = points.read(text.encode())
  assert not caplog.messages
  loose = "OFF\n9 6 12\n" + CUBE + "7 7 7\n" + FACES
  np.testing.assert_array_equal(points.read(loose.encode()), want)
  assert "points bytes: 1 of its 9 vertices belong to no face, left out" in caplog.text


def test_stl_in_capitals_is_read(tmp_path):
  text = trimesh.creation.box((1, 2, 3)).export(file_type="stl_ascii")
  np.testing.assert_array_equal(points.read(text.upper().encode()), points.read(text.encode()))
  (tmp_path / "a.stl").write_text("solid facet of a\ncolour 1 0 0\n" + text.partition("\n")[2])
  np.testing.assert_array_equal(points.read(tmp_path / "a.stl"), points.read(text.encode()))


def test_a_pcd_file_without_a_return_says_so():
  head = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 2\nHEIGHT 1\nDATA ascii\n"
  with pytest.raises(ValueError, match="points bytes: all 2 points are NaN"):
    points.read(f"{head}nan nan nan\nnan nan nan\n".encode())


def test_what_cannot_be_read_says_so_by_name(tmp_path):
  box = trimesh.creation.icosphere()
  cube = ("OFF\n8 6 12\n" + CUBE + FACES).encode()
  files = {
    "a.las": (b"LASF" + bytes(300), "LAS or LAZ"), "a.3mf": (b"PK\x03\x04" + bytes(99), "zip archive"),
    "a.gltf": (b'{"asset": {}}', "glTF as text"), "a.dae": (b"<?xml version='1.0'?>", "XML"),
    "a.fbx": (b"Kaydara FBX Binary", "FBX"), "a.step": (b"ISO-10303-21;", "STEP"), "a.e57": (b"ASTM-E57xx", "E57"),
    "a.bin": (bytes(99), "not known"), "empty.ply": (b"", "is empty"), "a.xyz": (b"C 0 0 0\nH 1 1 1\n", "table"),
    "b.xyz": (b"1 2 3\n4 5\n", "table"), "c.xyz": (b"1 2\n4 5\n", "lines of 2 numbers"),
    "a.pts": (b"3\n1 2 3\n4 5 6\n", "cut off"),
    "none.ply": (ply([[]] * 3, ["float"] * 3, ("x", "y", "z")), "no points|not a readable"),
    "one.ply": (ply([[1.0]] * 3, ["float"] * 3, ("x", "y", "z")), "all 1 points are one"),
    "nan.ply": (ply([[1.0, np.nan]] * 3, ["float"] * 3, ("x", "y", "z")), "not finite, in 1 of 2 points"),
    "huge.ply": (ply([*XYZ], ["float"] * 3, ("x", "y", "z"), count=2**40), "not a readable"),
    "cut.ply": (ply([*XYZ], ["float"] * 3, ("x", "y", "z"))[:-9], "not a readable"),
    "text.ply": (ply([*XYZ], ["float"] * 3, ("x", "y", "z"), "ascii", count=60), "cut off, its header says 60"),
    "cut.off": (cube[:-12], "cut off, it says 8 vertices and 6 faces"), "none.off": (b"OFF\n0 0 0\n", "not a readable"),
    "4d.off": (b"4OFF\n" + cube[4:], "of the kind 4OFF"), "bin.off": (b"OFF BINARY\n" + bytes(99), "or binary"),
    "cut.stl": (box.export(file_type="stl")[:-700], "says 1280 triangles, which are 64084 bytes, and .* 63384"),
    "text.stl": (box.export(file_type="stl_ascii").encode()[:9000], "31 facets begin and 30 end"),
    "end.stl": (box.export(file_type="stl_ascii").encode()[:-10], "1 solids begin and 0 end"),
    "solid.stl": (b"SOLID a\n", "has no facet"), "head.stl": (bytes(40), "there are 40"),
    "cut.glb": (box.export(file_type="glb")[:-90], "cut off"),
    "face.off": (cube.replace(b"4 1 3 7 5", b"4 1 3 7 9"), "not a readable"),
    "face.obj": (b"v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 9\n", "not a readable"),
    "big.xyz": (b"1e200 0 0\n0 0 0\n", "size 1e\\+200"), "small.xyz": (b"1e-200 0 0\n0 0 0\n", "size 1e-200"),
  }  # fmt: skip
  np.savez(tmp_path / "a.npz", P)
  np.save(tmp_path / "object.npy", np.array([{"a": 1}]), allow_pickle=True)
  np.save(tmp_path / "complex.npy", P + 1j)
  header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (91625968981, 3), }".ljust(117) + b"\n"
  (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(240))
  says = {"a.npz": "zip archive", "object.npy": "Python objects", "complex.npy": "complex128", "huge.npy": "916259",
          "no.ply": "no such file", "x" * 300: "not a readable", "nul\0.ply": "not a readable"}  # fmt: skip
  for name, (content, message) in files.items():
    (tmp_path / name).write_bytes(content)
    says[name] = message
  for name, message in says.items():
    with pytest.raises(ValueError, match=message) as error:
      raise AssertionError(f"{name} was read as {points.read(tmp_path / name)}")
    assert str(tmp_path / name) in str(error.value), name
  out = io.BytesIO()
  np.save(out, P)
  with pytest.raises(ValueError, match="points bytes: .*cut"):
    points.read(out.getvalue()[:-8])
