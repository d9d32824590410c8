"""Video: films, animations, folders and arrays to frames; the trunk that averages the image trunk over them."""

import io

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data.transforms import video
from codebind_jax.trunks import load_trunk
from tests.pretrained_fixtures import TINY_STAGES, tiny_image_trunk

pytestmark = pytest.mark.usefixtures("quick_compiler")


def greys(count, side=16):
  """Frames whose value tells their number: 10, 20, 30, ..."""
  return np.stack([np.full((side, side, 3), 10 * (i + 1), np.uint8) for i in range(count)])


def animation(frames, kind, **options):
  out = io.BytesIO()
  first, *rest = [Image.fromarray(frame) for frame in frames]
  first.save(out, kind, save_all=True, append_images=rest, duration=40, **options)
  return out.getvalue()


def film(path, frames, rate=10):
  av = pytest.importorskip("av")
  with av.open(str(path), "w") as out:
    stream = out.add_stream("mpeg4", rate=rate)
    stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
    stream.bit_rate = 4_000_000
    for frame in frames:
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    out.mux(stream.encode())
  return path


def numbers(frames):
  """Which of `greys` each frame is."""
  return np.round(frames.mean(axis=(1, 2, 3)) / 10).astype(int).tolist()


@pytest.mark.parametrize(
  ("count", "wanted", "want"),
  [(72, 4, [9, 27, 45, 63]), (3, 16, [0, 1, 2]), (16, 16, [*range(16)]), (1, 8, [0])],
)
def test_frames_are_spaced_evenly_and_never_repeated(count, wanted, want):
  assert video.spaced(count, wanted) == want


@pytest.mark.parametrize(("kind", "options"), [("webp", {"lossless": True}), ("gif", {}), ("png", {})])
def test_animations_are_read_frame_by_frame(kind, options, tmp_path):
  content = animation(greys(20), kind, **options)
  (tmp_path / "a").write_bytes(content)
  for value in (content, tmp_path / "a"):
    got = video.read(value, frames=4)
    assert got.shape == (4, 16, 16, 3) and got.dtype == np.uint8 and numbers(got) == [3, 8, 13, 18]
  video.check(tmp_path / "a")
  assert len(video.read(content)) == video.FRAMES


def test_transparency_is_laid_on_white():
  clear = np.zeros((2, 8, 8, 4), np.uint8)
  clear[1, :4] = (255, 0, 0, 255)
  got = video.read(animation(clear, "webp", lossless=True))
  assert (got[0] == 255).all() and got[1, 0, 0].tolist() == [255, 0, 0] and got[1, 7, 7].tolist() == [255, 255, 255]


def test_films_are_decoded_and_their_frames_counted(tmp_path):
  path = film(tmp_path / "a.mp4", greys(20, 32))
  for value in (path, str(path), path.read_bytes()):
    got = video.read(value, frames=4)
    assert got.shape == (4, 32, 32, 3) and numbers(got) == [3, 8, 13, 18]
  video.check(path)
  # A stream that names no count is decoded once more to count it.
  bare = film(tmp_path / "a.ts", greys(20, 32))
  assert numbers(video.read(bare, frames=4)) == [3, 8, 13, 18]


def test_a_damaged_film_is_named(tmp_path):
  path = film(tmp_path / "a.mp4", greys(9, 32))
  (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:200])
  for look in (video.read, video.check):
    with pytest.raises(ValueError, match=r"cut\.mp4: not a readable video"):
      look(tmp_path / "cut.mp4")
    with pytest.raises(ValueError, match="no such file or folder"):
      look(tmp_path / "none.mp4")


def test_a_film_without_pyav_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "av", None)
  (tmp_path / "a.mp4").write_bytes(b"film")
  with pytest.raises(ImportError, match="pip install av"):
    video.read(tmp_path / "a.mp4")


def test_folders_are_read_by_name(tmp_path):
  for i, frame in enumerate(greys(12)):
    Image.fromarray(frame).save(tmp_path / f"{i:03d}.png")
  (tmp_path / "notes.txt").write_text("no frame")
  assert numbers(video.read(tmp_path, frames=3)) == [3, 7, 11]
  video.check(tmp_path)
  Image.fromarray(greys(1, 8)[0]).save(tmp_path / "000.png")
  with pytest.raises(ValueError, match="frames differ in size"):
    video.read(tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty: no frames; allowed are files ending in \.png"):
    video.check(tmp_path / "empty")


def test_arrays_are_checked():
  assert numbers(video.read(greys(4))) == [1, 2, 3, 4]
  np.testing.assert_array_equal(video.read(greys(2) / 255.0), greys(2))
  for bad in (np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 2), np.uint8)):
    with pytest.raises(ValueError, match=r"allowed is \[t, h, w, 3\]"):
      video.read(bad)
  with pytest.raises(ValueError, match="got int"):
    video.read(3)


def test_the_trunk_is_the_mean_of_the_image_trunk_over_frames():
  options = {"size": 32, "levels": (1,), "crop": True}
  tiny = {"weights": "random", "stages": TINY_STAGES, "head_width": 24}
  trunk = load_trunk("video_mean", frames=4, each=True, **tiny, **options)
  picture = tiny_image_trunk(grid=0, **{key: value for key, value in options.items() if key != "size"})
  clip = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3)).astype(np.uint8)
  tokens = trunk.compiled(trunk.params, trunk.collate([trunk.preprocess(clip), trunk.preprocess(clip[::-1])]))
  assert tokens.shape == (2, 5, trunk.width) and trunk.width == picture.width and trunk.modality == "video"
  frames = picture.collate([picture.preprocess(clip[i]) for i in (1, 3, 5, 7)])
  seen = picture.compiled(trunk.params["picture"], frames)[:, 0]
  np.testing.assert_allclose(tokens[0, 1:], seen, atol=1e-5)
  np.testing.assert_allclose(tokens[0, 0], seen.mean(axis=0), atol=1e-5)
  still = trunk.preprocess(clip[:1])
  assert still.shape == (4, 32, 32, 3) and (still == still[0]).all()
  assert trunk.fingerprint != load_trunk("video_mean", frames=2, **tiny, **options).fingerprint
  with pytest.raises(ValueError, match="frames: got 17, allowed are 1 to 16"):
    load_trunk("video_mean", frames=17)
  with pytest.raises(ValueError, match="grid: got 2"):
    load_trunk("video_mean", grid=2)
