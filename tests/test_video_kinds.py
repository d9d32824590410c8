"""Films, animations and folders as people have them: turned, cut, of uneven time, with covers; errors name the file."""

import io
import json
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data import films
from codebind_jax.data.opening import check_item, open_source
from codebind_jax.data.transforms import video
from tests.picture_fixtures import encoded, png, tiff, turned

av = pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("quick_compiler")

ONE = 0x10000


def greys(count, h=48, w=64):
  """Frame i has the value 10 + 2 i."""
  return [np.full((h, w, 3), 10 + 2 * i, np.uint8) for i in range(count)]


def film(path, frames, pts=None, codec="mpeg4", aspect=None, **options):
  """A film of ten frames a second."""
  with av.open(str(path), "w", options=options) as out:
    stream = out.add_stream(codec, rate=10)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
    if aspect:
      stream.codec_context.sample_aspect_ratio = aspect
    for i, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      if pts is not None:
        picture.pts = pts[i]
      out.mux(stream.encode(picture))
    out.mux(stream.encode())
  return path


def numbers(frames):
  """Which of `greys` each frame is."""
  return np.round((frames.mean(axis=(1, 2, 3)) - 10) / 2).astype(int).tolist()


def close(frames, want):
  """Whether frames are these of `greys`, or their neighbours: the codec rounds."""
  return len(frames) == len(want) and np.abs(np.array(numbers(frames)) - want).max() <= 1


def box(kind, content):
  return struct.pack(">I", 8 + len(content)) + kind + content


def matrix_of(content, matrix):
  """An mp4 with another display matrix."""
  content, at = bytearray(content), content.find(b"tkhd") + 4 + 4 + 36
  content[at : at + 36] = struct.pack(">9i", *matrix)
  return bytes(content)


CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# (a, b, c, d): a pixel (x, y) goes to (a x + c y, b x + d y).
TURNS = {
  "none": ((1, 0, 0, 1), lambda x: x), "quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
  "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)), "quarter back": ((0, -1, 1, 0), lambda x: np.rot90(x)),
  "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]), "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
  "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
  "transposed the other way": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def corners(tmp_path_factory):
  return film(tmp_path_factory.mktemp("film") / "a.mp4", [CORNERS] * 6).read_bytes()


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_is_turned_as_its_display_matrix_says(corners, turn):
  (a, b, c, d), undo = TURNS[turn]
  content = matrix_of(corners, (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 0x40000000))
  want = undo(CORNERS)
  for got in (video.read(content, frames=2)[0], video.read_clips(content, 1)[0, 0]):
    assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 12
  with av.open(io.BytesIO(content)) as container:  # PyAV's own reading of the turn, which does not see mirrors
    angle = next(container.decode(video=0)).rotation
  assert angle == {"quarter clockwise": -90, "quarter back": 90}.get(turn, angle)


def test_a_slight_turn_is_said(corners, caplog):
  near = np.round(np.array([0.9, 0.43, -0.43, 0.9]) * ONE).astype(int)
  content = matrix_of(corners, (near[0], near[1], 0, near[2], near[3], 0, 0, 0, 0x40000000))
  with caplog.at_level("WARNING"):
    assert video.read(content, frames=1)[0].shape == CORNERS.shape
  assert "is not held by quarter turns" in caplog.text


@pytest.mark.parametrize(("aspect", "want"), [
  ((4, 3), (48, 85)), ((2, 1), (48, 128)), ((1, 2), (96, 64)), ((1, 1), (48, 64))])
def test_pixels_become_square(tmp_path, aspect, want):
  path = film(tmp_path / "a.mkv", [CORNERS] * 3, aspect=Fraction(*aspect))
  got = video.read(path)[0]
  assert got.shape == (*want, 3) and got[2, 2].argmax() == 0 and got[2, -3].argmax() == 1


def test_pixels_of_no_likely_shape_are_said(tmp_path, caplog):
  with caplog.at_level("WARNING"):
    assert films.squared(CORNERS, 30.0, "a.mp4") is CORNERS
  assert "a.mp4: says that its pixels are 30 times as wide as high" in caplog.text


@pytest.mark.parametrize(("number", "says"), [(16, "is in HDR (PQ)"), (18, "is in HDR (HLG)"), (1, "")])
def test_hdr_is_said(tmp_path, number, says, caplog):
  path = tmp_path / f"{number}.mp4"
  with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    stream.codec_context.color_trc = number
    for frame in greys(2):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
      picture.color_trc = number
      out.mux(stream.encode(picture))
    out.mux(stream.encode())
  with caplog.at_level("WARNING"):
    assert video.read(path).shape == (2, 48, 64, 3)
  assert says in caplog.text and (says or not caplog.text)


def edited(content, begin, share):
  """An mp4 whose edit list shows a share of the film from a begin on."""
  content = bytearray(content)
  at = content.find(b"elst") + 12
  length, _, rate = struct.unpack(">IiI", content[at : at + 12])
  content[at : at + 12] = struct.pack(">IiI", int(length * share), begin, rate)
  return bytes(content)


@pytest.mark.parametrize(("begin", "share", "first"), [(80, 0.2, 80), (0, 0.2, 0), (40, 0.4, 40)])
def test_what_an_edit_list_hides_is_not_used(tmp_path, begin, share, first):
  content = film(tmp_path / "a.mp4", greys(100)).read_bytes()
  with av.open(io.BytesIO(content)) as whole:
    duration = whole.streams.video[0].duration
  (tmp_path / "cut.mp4").write_bytes(edited(content, duration * begin // 100, share))
  with av.open(str(tmp_path / "cut.mp4")) as container:  # the second implementation: what a player shows
    shown = sum(1 for _ in container.decode(video=0))
  got = numbers(video.read(tmp_path / "cut.mp4"))
  want = [first + int((k + 0.5) * shown / 16) for k in range(16)]
  assert len(got) == 16 and np.abs(np.array(got) - want).max() <= 1
  clips = numbers(video.read_clips(tmp_path / "cut.mp4", 2, seconds=1.0).reshape(-1, 48, 64, 3))
  assert min(clips) >= first - 1 and max(clips) <= first + shown


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "mov"])
def test_a_cut_film_is_said_and_read_as_far_as_it_goes(tmp_path, kind, caplog):
  options = {"movflags": "+faststart"} if kind in ("mp4", "mov") else {}
  rng = np.random.default_rng(0)
  frames = [frame + rng.integers(0, 4, frame.shape).astype(np.uint8) for frame in greys(100)]
  path = film(tmp_path / f"whole.{kind}", frames, **options)
  content = path.read_bytes()
  cut = tmp_path / f"cut.{kind}"
  cut.write_bytes(content[: len(content) // 2])
  with caplog.at_level("WARNING"):
    assert max(numbers(video.read(path))) > 90
    assert "cut" not in caplog.text
    got = numbers(video.read(cut))
  assert len(got) == 16 and got == sorted(got) and 20 < got[-1] < 70
  assert f"cut.{kind}: cut or damaged" in caplog.text


@pytest.mark.parametrize("kind", ["mp4", "mkv", "nut", "asf", "ts", "avi"])
def test_a_film_that_starts_late_is_not_cut_unless_it_is(tmp_path, kind, caplog):
  rng = np.random.default_rng(0)
  frames = [frame + rng.integers(0, 4, frame.shape).astype(np.uint8) for frame in greys(60)]
  codec = "mpeg2video" if kind == "ts" else "mpeg4"
  path = tmp_path / f"late.{kind}"
  with av.open(str(path), "w") as out:
    stream = out.add_stream(codec, rate=25)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt, stream.bit_rate, stream.codec_context.time_base = "yuv420p", 4_000_000, Fraction(1, 25)
    for number, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = 2500 + number, Fraction(1, 25)
      out.mux(stream.encode(picture))
    out.mux(stream.encode())
  with caplog.at_level("WARNING"):
    assert video.read(path).shape[0] == 16
    assert "cut" not in caplog.text
    if kind == "mkv":  # others do not say a length that is lost
      (tmp_path / f"half.{kind}").write_bytes(path.read_bytes()[: path.stat().st_size // 3])
      video.read(tmp_path / f"half.{kind}")
      assert "cut or damaged" in caplog.text and "of the 2.4 s" in caplog.text


def cover_first(content):
  """An mp4 whose tags, which hold a cover, come before its track."""
  cover = encoded(Image.new("RGB", (32, 32), (0, 255, 0)), "JPEG")
  data = box(b"data", struct.pack(">II", 13, 0) + cover)
  head = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
  tag = box(b"udta", box(b"meta", bytes(4) + head + box(b"ilst", box(b"covr", data))))
  at = content.find(b"moov") - 4
  moov = content[at + 8 : at + struct.unpack(">I", content[at : at + 4])[0]]
  first = struct.unpack(">I", moov[:4])[0]
  return content[:at] + box(b"moov", moov[:first] + tag + moov[first:])


def test_a_cover_is_not_the_film(tmp_path):
  content = cover_first(film(tmp_path / "a.mp4", greys(20)).read_bytes())
  with av.open(io.BytesIO(content)) as container:
    assert len(container.streams.video) == 2 and container.streams.video[0].width == 32
  assert video.read(content).shape == (16, 48, 64, 3) and close(video.read(content, frames=2), [5, 15])
  (tmp_path / "b.mp4").write_bytes(content)
  video.check(tmp_path / "b.mp4")


def test_a_cover_that_is_stored_as_a_stream_is_not_the_film(tmp_path):
  path = tmp_path / "a.mkv"
  with av.open(str(path), "w") as out:
    cover, stream = out.add_stream("mjpeg", rate=1), out.add_stream("mpeg4", rate=10)
    cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
    out.mux(cover.encode())
    for frame in greys(10):
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    out.mux(stream.encode())
  assert video.read(path).shape == (10, 48, 64, 3)


def test_a_song_with_a_cover_is_no_film(tmp_path):
  path = tmp_path / "song.mp4"
  with av.open(str(path), "w") as out:
    stream = out.add_stream("aac", rate=44100)
    wave = (np.sin(np.arange(44100) / 20) * 8000).astype(np.int16)[None]
    sound = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
    sound.sample_rate = 44100
    out.mux(stream.encode(sound))
    out.mux(stream.encode())
  path.write_bytes(cover_first(path.read_bytes()))
  for look in (video.read, video.check):
    with pytest.raises(ValueError, match="song.mp4: has no video stream"):
      look(path)


def test_frames_of_a_film_are_even_in_time(tmp_path):
  """A screen recording: 50 frames in 5 s, then one every 2 s for 20 s."""
  frames = [*greys(50), *[np.full((48, 64, 3), 150 + 10 * k, np.uint8) for k in range(10)]]
  path = film(tmp_path / "a.mp4", frames, pts=[*range(50), *(50 + 20 * k for k in range(10))])
  means = video.read(path).mean(axis=(1, 2, 3))
  with av.open(str(path)) as container:
    starts = [(frame.time, frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    seconds = container.duration / 1e6
  at = [(k + 0.5) * seconds / 16 for k in range(16)]
  want = [[mean for start, mean in starts if start <= t + 0.06][-1] for t in at]
  assert len(means) == 16 and np.abs(means - want).max() < 3
  clips = video.read_clips(path, 5).mean(axis=(2, 3, 4))
  assert (clips[0] < 100).all() and (clips[1:] > 145).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation_are_even_in_time(kind):
  first, *rest = [Image.fromarray(np.full((16, 16, 3), 20 + 20 * i, np.uint8)) for i in range(10)]
  options = {"lossless": True} if kind == "WEBP" else {}
  content = encoded(first, kind, save_all=True, append_images=rest, duration=[100] * 9 + [2700], **options)
  got = ((video.read(content, frames=8).mean(axis=(1, 2, 3)) - 20) / 20).round().astype(int).tolist()
  assert got == [2, 6] + [9] * 6  # 3.6 s: at 0.225, 0.675, 1.125, ... s
  clips = video.read_clips(content, 2, seconds=0.5).mean(axis=(2, 3, 4))
  assert ((clips - 20) / 20).round().tolist() == [[0, 4], [9, 9]]


@pytest.mark.parametrize(("seconds", "want"), [
  ([1.0, 1.0, 1.0], [0, 1, 2]), ([1.0, 3.0, 1.0], [0, 1, 1, 1, 2]), ([2.0], [0]), ([1.0, 4.0], [0, 1, 1, 1, 1])])
def test_a_clock_repeats_what_is_shown_longer(seconds, want):
  assert films.clock(np.array(seconds))[0].tolist() == want


def test_a_clock_forgives_rounded_times_and_stays_small():
  milliseconds = np.diff(np.round(np.arange(61) * 1000 / 30)) / 1000
  steps, rate = films.clock(milliseconds)
  assert steps.tolist() == [*range(60)] and rate == pytest.approx(30)
  steps, _ = films.clock(np.array([1e-9, 1e6]))
  assert len(steps) == 1024 and set(steps.tolist()) == {1}


def test_the_picture_before_an_animation_is_none_of_its_frames():
  first, *rest = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(5)]
  content = encoded(first, "PNG", save_all=True, append_images=rest, default_image=True, duration=100)
  assert video.read(content).mean(axis=(1, 2, 3)).tolist() == [40, 80, 120, 160]


def test_a_still_picture_is_one_frame_and_is_turned():
  assert video.read(turned(CORNERS, "PNG")).shape == (1, 64, 48, 3)
  deep = video.read(tiff(np.full((4, 4), 0x8000), 16, 1, pages=3))
  assert deep.shape == (3, 4, 4, 3) and (deep == 128).all()
  two = encoded(CORNERS, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])  # a phone's depth or preview
  assert video.read(two).shape == (1, 48, 64, 3)


def test_a_gif_that_is_cut_is_said(caplog):
  rng = np.random.default_rng(0)
  first, *rest = [Image.fromarray(rng.integers(0, 256, (24, 32), dtype=np.uint8)) for _ in range(6)]
  content = encoded(first, "GIF", save_all=True, append_images=rest)
  silent = []
  with caplog.at_level("WARNING"):
    assert len(video.read(content)) == 6 and not caplog.text
    for cut in range(20, len(content) - 1, 7):
      caplog.clear()
      try:
        got = video.read(content[:cut])
      except ValueError as error:
        assert str(error).startswith("video bytes: ")
      else:
        silent += [cut] * (len(got) == 6 and cut < len(content) - 900)
  assert not silent


def test_no_header_of_a_film_is_believed(tmp_path):
  content = bytearray(film(tmp_path / "a.mp4", greys(20)).read_bytes())
  sizes, times = content.find(b"stsz"), content.find(b"stts")
  promised = bytearray(content)
  promised[sizes + 4 : sizes + 16] = struct.pack(">III", 0, 1, 0xFFFFFFF0)
  with pytest.raises(ValueError, match="video bytes: "):
    video.read(bytes(promised))
  promised = bytearray(content)
  promised[times + 12 : times + 16] = struct.pack(">I", 0xFFFFFFF0)
  with av.open(io.BytesIO(promised)) as container:
    assert container.streams.video[0].frames > 4e9
  assert close(video.read(bytes(promised), frames=2), [5, 15])


def test_frames_that_are_too_large_are_refused(tmp_path, monkeypatch):
  path = film(tmp_path / "a.mp4", greys(3))
  monkeypatch.setattr(films, "PIXELS", 2000)
  with pytest.raises(ValueError, match="a.mp4: "):
    video.read(path)
  for content in (png(50, 50, 8, 2, [bytes(150)] * 50), encoded(Image.new("L", (50, 50)), "GIF")):
    with pytest.raises(ValueError, match="video bytes: frames of 50 x 50 pixels, allowed are 2000"):
      video.read(content)
  Image.new("RGB", (50, 50)).save(tmp_path / "1.png")
  with pytest.raises(ValueError, match="frames of 50 x 50"):
    video.read(tmp_path)


@pytest.mark.parametrize(("name", "content", "says"), [
  ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\na.ts\n#EXT-X-ENDLIST\n", "not a readable video"),
  ("text.mp4", b"ffconcat version 1.0\nfile a.mp4\n", "not a readable video"),
  ("a.nfo", b"\x1b[31m some text " * 40, "not a readable video"), ("empty.mp4", b"", "not a readable video"),
  ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC picture is not read"),
  ("bomb.png", png(60_000, 60_000, 8, 2, []), "DecompressionBomb"), ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a")])
def test_what_is_no_film_is_refused_by_name(tmp_path, name, content, says):
  (tmp_path / name).write_bytes(content)
  for value, named in ((tmp_path / name, str(tmp_path / name)), (content, "video bytes")):
    with pytest.raises(ValueError, match=says) as caught:
      video.read(value)
    assert str(caught.value).startswith(f"{named}: ")


@pytest.mark.parametrize("name", ["12:30.mp4", "a%03d.mp4", "pipe:0.mp4", "später.mp4"])
def test_no_part_of_a_name_is_a_protocol_or_a_pattern(tmp_path, name, monkeypatch):
  film(tmp_path / "a.mp4", greys(4)).rename(tmp_path / name)
  monkeypatch.chdir(tmp_path)
  assert len(video.read(name)) == 4


def test_names_that_no_file_can_have(tmp_path):
  for name in ("x" * 300 + ".mp4", "a\0b.mp4"):
    for look in (video.read, video.check):
      with pytest.raises(ValueError, match="no such file|not a readable video"):
        look(tmp_path / name)


def test_every_error_of_a_damaged_film_names_it(tmp_path):
  rng = np.random.default_rng(0)
  contents = [film(tmp_path / f"a.{kind}", greys(12)).read_bytes() for kind in ("mp4", "mkv", "avi")]
  first, *rest = [Image.fromarray(frame) for frame in greys(4)]
  contents += [encoded(first, kind, save_all=True, append_images=rest) for kind in ("GIF", "WEBP", "PNG", "AVIF")]
  for content in contents:
    for _ in range(12):
      changed = bytearray(content[: rng.integers(1, len(content))] if _ % 2 else content)
      for at in rng.integers(0, min(len(changed), 900), 4):
        changed[at] = rng.integers(256)
      try:
        assert video.read(bytes(changed)).dtype == np.uint8
      except ValueError as error:
        assert str(error).startswith("video bytes: ")


def folder(path, names):
  path.mkdir()
  for i, name in enumerate(names):
    Image.new("RGB", (16, 16), (10 + 10 * i,) * 3).save(path / name)
  return path


def test_frames_of_a_folder_come_by_number(tmp_path, caplog):
  path = folder(tmp_path / "clip", ["frame-1.png", "frame-2.png", "frame-9.jpg", "frame-10.png", "frame-100.png"])
  (path / "._frame-3.png").write_bytes(b"what macOS leaves")
  (path / "Thumbs.db").write_bytes(b"x")
  (path / "labels.json").write_text("{}")
  (path / "frame-4.png").mkdir()
  with caplog.at_level("WARNING"):
    assert video.read(path).mean(axis=(1, 2, 3)).round(-1).tolist() == [10, 20, 30, 40, 50]
  video.check(path)
  assert "2 kinds: frame-#.jpg, frame-#.png" in caplog.text


def test_a_folder_of_frames_is_a_video_of_a_manifest(tmp_path):
  folder(tmp_path / "clip", [f"{i}.png" for i in range(1, 13)])
  (tmp_path / "m.jsonl").write_text('{"id": "1", "video": "clip", "text": "red"}\n')
  source = open_source(tmp_path / "m.jsonl", data_dir=tmp_path / "data")
  assert source[0]["video"].mean(axis=(1, 2, 3)).tolist() == [10 + 10 * i for i in range(12)]
  before, known = source.content_hash(0, "video"), source.identity(0, "video")
  assert len(before) == 64 and source.identity(0, "video") == known
  Image.new("RGB", (99, 99)).save(tmp_path / "clip" / "12.png")  # in place: the folder's own time stays
  assert source.content_hash(0, "video") != before and source.identity(0, "video") != known


def test_a_name_that_no_file_can_have_is_a_bad_record(tmp_path, caplog):
  folder(tmp_path / "clip", ["1.png"])
  rows = [{"id": str(i), "video": name} for i, name in enumerate(("clip", "x" * 300 + ".mp4", "a\0b.mp4"))]
  (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with caplog.at_level("WARNING"):
    source = open_source(tmp_path / "m.jsonl", data_dir=tmp_path / "data", max_bad_records=2)
  assert caplog.text.count("will be left out") == 2
  assert [source.identity(i, "video").strip() == "video" for i in range(3)] == [False, True, True]


def test_a_folder_with_a_damaged_frame_names_it(tmp_path):
  path = folder(tmp_path / "clip", ["1.png", "2.png"])
  (path / "2.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="2.png: not a readable image"):
    video.read(path)
  (path / "1.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="video: .*1.png: not a readable image"):
    check_item("video", path)
