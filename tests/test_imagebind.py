"""ImageBind checkpoints: the release's embeddings, its preparation of items, its names, and what is refused."""

import dataclasses
import functools
import math
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from PIL import Image

from codebind_jax.data.preparation.audio import Sound
from codebind_jax.data.preparation.imagebind import item_input
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD
from codebind_jax.data.transforms import audio, video
from codebind_jax.models.imagebind import HUGE
from codebind_jax.trunks import imagebind, names
from codebind_jax.trunks.checkpoint_files import Entry, Weights, open_weights, write_shapes
from tests import family_fixtures
from tests.model_fixtures import encoder_params, error, golden, inputs, official, spec, state_dict
from tests.torch_files import torch_zip

MODALITIES = ("image", "video", "text", "audio", "depth", "thermal", "imu", "tactile", "eeg")
C = golden("codebind_model_tiny_encoder")


def heads(modality):
  return spec("image" if modality in ("video", "vision") else modality).heads


def published(*modalities):
  """The release's state dict, of some modalities alone: with the text's mask, without CodeBind's specific heads."""
  arrays = {name: value for name, value in state_dict().items() if not name.startswith("modality_heads_mvq")}
  arrays["modality_preprocessors.text.mask"] = np.zeros((77, 77), np.float32)
  wanted = [imagebind.official_name(m) for m in modalities or MODALITIES]
  return {name: value for name, value in arrays.items() if name.split(".")[1] in wanted}


def contiguous(state):
  return {name: np.asarray(value, order="C") for name, value in state.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("imagebind") / "imagebind.safetensors"
  safetensors.numpy.save_file(contiguous(published()), path)
  return path


def trunk(file, modality, **options):
  return imagebind.make_trunk(weights=str(file), modality=modality, heads=heads(modality), **options)


@pytest.mark.parametrize("modality", MODALITIES)
def test_embeddings_equal_those_of_the_release(modality, file):
  """Configuration C of the fixture is ImageBind: the published head, the factor, the mean over clips."""
  found = trunk(file, modality, scan=modality in ("depth", "text"))
  x = inputs(modality)
  out = found.embed(x) * found.head.logit_scale
  if modality == "video":  # the fixture has a video's embedding by CodeBind's heads alone, so that clips are compared
    one = [trunk(file, "image").embed(x[:, i])[0] for i in range(x.shape[1])]
    np.testing.assert_allclose(out[0], np.mean(one, axis=0), atol=2e-6)
    return
  assert error(out, C[f"C/{official(modality)}"]) < 1e-5
  assert found.licence.startswith("CC-BY-NC 4.0") and found.modality == modality
  assert found.encoded.clips == (3 if modality == "audio" else 1)


def test_tokens_and_parameters_are_those_of_the_encoder(file):
  found = trunk(file, "depth")
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), encoder_params("depth"))
  assert (found.num_tokens, found.width) == (197, spec("depth").width)
  assert dataclasses.replace(spec("depth"), mlp=4 * spec("depth").width) == found.module.spec


def test_vision_is_another_name_of_image_and_video_shares_its_encoder(file):
  assert trunk(file, "vision").modality == "image"
  assert trunk(file, "video").module.spec == trunk(file, "image").module.spec
  assert trunk(file, "video").input.shape == (15, 2, 224, 224, 3)
  assert trunk(file, "video", clips=2, crops=1).input.shape == (2, 2, 224, 224, 3)


def test_uint8_pixels_are_normalised_by_the_module(file):
  found = trunk(file, "image")
  pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
  by_hand = ((pixels / 255.0 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
  np.testing.assert_allclose(found.embed(pixels), found.embed(by_hand), atol=1e-6)
  grey = np.random.default_rng(1).integers(0, 256, (1, 224, 224, 1), np.uint8)
  thermal = trunk(file, "thermal")  # thermal pictures lie in 0 to 1, without statistics
  np.testing.assert_allclose(thermal.embed(grey), thermal.embed((grey / 255.0).astype(np.float32)), atol=1e-6)


def test_without_weights_the_parameters_are_drawn():
  for modality in MODALITIES:
    found = imagebind.make_trunk(modality=modality)
    assert found.load is None and found.head.load is None and found.licence == ""
    assert found.module.spec.width == HUGE["image" if modality == "video" else modality].width
    assert found.head.module.width == 1024
  shapes = imagebind.make_trunk(modality="eeg", width=12, depth=1, heads=2).shapes
  assert shapes["stem"]["positions"].shape == (513, 12) and list(shapes["trunk"]) == ["blocks_0"]


# --- files


def test_a_torch_file_and_a_folder_give_the_same(tmp_path, file):
  state = published("depth")
  path = tmp_path / "imagebind_huge.pth"
  path.write_bytes(torch_zip(state))
  assert imagebind.modalities(path) == imagebind.modalities(tmp_path) == ("depth",)
  for place in (path, tmp_path):
    found = trunk(place, "depth")
    jax.tree.map(np.testing.assert_array_equal, found.params, trunk(file, "depth").params)
    jax.tree.map(np.testing.assert_array_equal, found.head_params, trunk(file, "depth").head_params)
  wrapped = tmp_path / "wrapped.pth"
  wrapped.write_bytes(torch_zip({f"module.{name}": value for name, value in state.items()}, wrapper="state_dict"))
  jax.tree.map(np.testing.assert_array_equal, trunk(wrapped, "depth").params, found.params)


def test_the_same_trunk_is_made_of_the_file_s_shapes(file, tmp_path):
  """A saved model keeps no values of its trunks' checkpoints."""
  write_shapes(tmp_path / file.name, open_weights(file))
  for modality in ("depth", "text"):
    found, again = trunk(file, modality), trunk(tmp_path / file.name, modality)
    assert again.fingerprint == found.fingerprint and again.head.logit_scale == pytest.approx(found.head.logit_scale)
    assert again.shapes == found.shapes


def test_recognised_by_its_names_and_nothing_foreign_raises(tmp_path, file):
  assert imagebind.recognises(file) and imagebind.modalities(file) == MODALITIES
  (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 and nothing")
  (tmp_path / "text.safetensors").write_text("no header")
  safetensors.numpy.save_file({"visual.proj": np.zeros((2, 2), np.float32)}, tmp_path / "clip.safetensors")
  for name in ("broken.pth", "text.safetensors", "clip.safetensors", "missing.pth", "."):
    assert not imagebind.recognises(tmp_path / name)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda f, t: imagebind.make_trunk(modality="smell"), "modality: got 'smell', allowed are image, text"),
    (lambda f, t: imagebind.make_trunk(weights=str(f), width=8), "width 8, depth 0: allowed are 0 with weights"),
    (lambda f, t: imagebind.make_trunk(weights=str(t / "no.pth")), r"no\.pth: no such file"),
    (lambda f, t: imagebind.make_trunk(weights=str(t)), "holds no ImageBind checkpoint; looked for imagebind_huge.pth"),
    (lambda f, t: imagebind.make_trunk(weights=str(t / "a.zip")), r"must end in one of \.pth"),
    (lambda f, t: imagebind.make_trunk(weights=str(f), modality="smell"), "has no 'smell'; it has image, video, text"),
    (lambda f, t: imagebind.make_trunk(weights=str(f), modality="depth"), "'depth' is 16 wide, ImageBind-Huge's 384"),
    (lambda f, t: imagebind.make_trunk(weights=str(f), modality="video", heads=4, crops=2), "crops 2: allowed"),
    (lambda f, t: imagebind.make_trunk(weights=str(f), modality="depth", heads=5).params, "heads: 5 does not divide"),
  ],
)
def test_what_is_refused(make, message, file, tmp_path):
  with pytest.raises(ValueError, match=message):
    make(file, tmp_path)


def test_errors_name_every_missing_superfluous_and_misshapen_array(tmp_path):
  state = published("imu")
  del state["modality_trunks.imu.blocks.0.attn.bias_k"]
  state["modality_trunks.imu.blocks.0.attn.bias_q"] = np.ones(3, np.float32)
  state["modality_trunks.imu.blocks.1.mlp.fc2.bias"] = np.ones(7, np.float32)
  safetensors.numpy.save_file(contiguous(state), tmp_path / "broken.safetensors")
  with pytest.raises(ValueError) as caught:
    trunk(tmp_path / "broken.safetensors", "imu").params
  width = spec("imu").width
  for part in (f"{tmp_path}/broken.safetensors: missing ['modality_trunks.imu.blocks.0.attn.bias_k (for",
               "superfluous ['modality_trunks.imu.blocks.0.attn.bias_q']",
               f"modality_trunks.imu.blocks.1.mlp.fc2.bias (7,) for trunk/blocks_1/mlp/fc2/bias ({width},)"):
    assert part in str(caught.value)


def test_the_licence_is_in_the_log_once(file, tmp_path, caplog):
  logging.get_absl_logger().propagate = True
  copy = tmp_path / "copy.safetensors"
  copy.write_bytes(file.read_bytes())
  with caplog.at_level("WARNING", logger="absl"):
    trunk(copy, "depth")
    trunk(copy, "imu")
  assert caplog.text.count("CC-BY-NC 4.0") == 1


def test_the_factor_is_clipped_and_images_have_none(tmp_path, file):
  assert trunk(file, "image").head.logit_scale == 1.0
  state = published("depth") | {"modality_postprocessors.depth.1.log_logit_scale": np.float32(9)}
  safetensors.numpy.save_file(contiguous(state), tmp_path / "d.safetensors")
  assert trunk(tmp_path / "d.safetensors", "depth").head.logit_scale == 100.0


def test_fingerprints_tell_modality_heads_and_preparation_apart(file):
  prints = [trunk(file, "image").fingerprint, trunk(file, "video").fingerprint, trunk(file, "audio").fingerprint,
            trunk(file, "audio", clips=2).fingerprint, trunk(file, "depth").fingerprint,
            trunk(file, "depth", baseline=0.1).fingerprint, trunk(file, "audio", dtype="bfloat16").fingerprint,
            imagebind.make_trunk(weights=str(file), modality="audio", heads=2).fingerprint]  # fmt: skip
  assert len(set(prints)) == len(prints)
  assert trunk(file, "depth", scan=True).fingerprint == trunk(file, "depth").fingerprint


# --- the official file


# Widths, depths and heads as ImageBind's `imagebind_huge` states them; its stems' arrays by modality.
OFFICIAL = {"vision": (1280, 32), "text": (1024, 24), "audio": (768, 12), "depth": (384, 12), "thermal": (768, 12),
            "imu": (512, 6)}  # fmt: skip
NORM = ("norm_layer.weight", "norm_layer.bias")
STEMS = {
  "vision": {"cls_token": (1, 1, 1280), "rgbt_stem.proj.1.weight": (1280, 3, 2, 14, 14),
             "pos_embedding_helper.pos_embed": (1, 257, 1280)},
  "text": {"pos_embed": (1, 77, 1024), "mask": (77, 77), "token_embedding.weight": (49408, 1024)},
  "audio": {"cls_token": (1, 1, 768), "rgbt_stem.proj.weight": (768, 1, 16, 16),
            "pos_embedding_helper.pos_embed": (1, 229, 768), **{f"rgbt_stem.{name}": (768,) for name in NORM}},
  "depth": {"cls_token": (1, 1, 384), "depth_stem.proj.weight": (384, 1, 16, 16),
            "pos_embedding_helper.pos_embed": (1, 197, 384), **{f"depth_stem.{name}": (384,) for name in NORM}},
  "thermal": {"cls_token": (1, 1, 768), "rgbt_stem.proj.weight": (768, 1, 16, 16),
              "pos_embedding_helper.pos_embed": (1, 197, 768), **{f"rgbt_stem.{name}": (768,) for name in NORM}},
  "imu": {"cls_token": (1, 1, 512), "imu_stem.proj.weight": (512, 48), "pos_embed": (1, 251, 512),
          **{f"imu_stem.{name}": (512,) for name in NORM}},
}  # fmt: skip


@functools.cache
def official_shapes():
  shapes = {}
  for m, (width, depth) in OFFICIAL.items():
    shapes |= {f"modality_preprocessors.{m}.{name}": shape for name, shape in STEMS[m].items()}
    if m == "vision":
      shapes |= {f"modality_trunks.vision.pre_transformer_layer.0.{kind}": (width,) for kind in ("weight", "bias")}
    block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
             "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,), "norm_1.weight": (width,),
             "norm_1.bias": (width,), "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
             "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,), "norm_2.weight": (width,),
             "norm_2.bias": (width,)}  # fmt: skip
    if m not in ("vision", "text"):
      block |= {f"attn.bias_{kind}": (1, 1, width) for kind in "kv"}
    shapes |= {f"modality_trunks.{m}.blocks.{i}.{name}": s for i in range(depth) for name, s in block.items()}
    head = "proj." if m == "text" else ""
    linear = {"text": "1", "imu": "3"}.get(m, "2")
    shapes |= {f"modality_heads.{m}.{head}0.{kind}": (width,) for kind in ("weight", "bias")}
    shapes[f"modality_heads.{m}.{head}{linear}.weight"] = (1024, width)
    if m != "vision":
      shapes[f"modality_postprocessors.{m}.1.log_logit_scale"] = ()
  return shapes


def zeros(shapes, file):
  """A checkpoint of these shapes, whose arrays are one zero seen everywhere."""
  entry = lambda shape: Entry(shape, np.dtype(np.int8), lambda: np.broadcast_to(np.int8(0), shape))
  return Weights({name: entry(shape) for name, shape in shapes.items()}, (file,))


def test_the_names_are_those_of_the_release():
  """The tiny fixture has the release's own names; of the blocks, the first two are compared."""
  deep = tuple(f".blocks.{i}." for i in range(2, 32))
  shallow = lambda state: {name for name in state if not any(block in name for block in deep)}
  assert shallow(published("image", "text", "audio", "depth", "thermal", "imu")) == shallow(official_shapes())


@pytest.mark.parametrize("modality", [m for m in MODALITIES if m not in ("tactile", "eeg")])
def test_every_array_of_imagebind_huge_has_its_place(modality, monkeypatch, tmp_path):
  file = tmp_path / "imagebind_huge.pth"
  file.write_bytes(b"x")
  monkeypatch.setattr(imagebind, "open_weights", lambda path: zeros(official_shapes(), file))
  found = imagebind.make_trunk(weights=str(file), modality=modality, scan=False)
  assert found.module.spec == dataclasses.replace(
    HUGE["image" if modality == "video" else modality], mlp=4 * found.module.spec.width, mean=found.module.spec.mean,
    std=found.module.spec.std)  # fmt: skip
  small = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.int8), found.shapes)
  with monkeypatch.context() as patch:  # nothing is allocated
    patch.setattr(names, "Placed", family_fixtures.Nowhere)
    loaded = found.load(small)
  m = imagebind.official_name(modality)
  mine = {n: math.prod(s) for n, s in official_shapes().items()
          if n.split(".")[1] == m and n.startswith(("modality_pre", "modality_trunks")) and not n.endswith("mask")}
  assert sum(leaf.size for leaf in jax.tree.leaves(loaded)) == sum(mine.values())
  head = jax.eval_shape(found.head.module.init, jax.random.key(0), jnp.zeros((1, 1, OFFICIAL[m][0])))["params"]
  assert jax.tree.map(np.shape, found.head.load(head)) == jax.tree.map(np.shape, head)
  assert head["proj"]["kernel"].shape == (OFFICIAL[m][0], 1024)


# --- preparation


def item(modality, **options):
  spec = HUGE["image" if modality == "video" else modality]
  return item_input(modality, spec.size, spec.channels, **options)


@pytest.mark.parametrize("name", ["wide", "small"])
def test_pixels_equal_the_release(name):
  arrays = golden("imagebind_pictures")
  pixels = item("image").prepare(arrays[f"image/{name}/rgb"])
  np.testing.assert_array_equal(pixels[::3], arrays[f"image/{name}/pixels"])
  assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_crops_of_a_clip_equal_the_release(name):
  arrays = golden("imagebind_pictures")
  prepare = item_input("video", (2, 64, 64), clips=1).prepare
  crops = prepare(arrays[f"video/{name}/frames"][None])
  assert crops.shape == (3, 2, 64, 64, 3)
  assert error(crops[:, :, ::4, ::4], arrays[f"video/{name}/crops"]) < 1e-6
  middle = item_input("video", (2, 64, 64), clips=1, crops=1).prepare(arrays[f"video/{name}/frames"][None])
  np.testing.assert_array_equal(middle[0], crops[1])


def test_clips_begin_where_the_release_begins_them():
  for duration, starts in ((1.5, [0.0] * 5), (2.0, [0.0] * 5), (7.25, [0.0, 1.3125, 2.625, 3.9375, 5.25])):
    count = int(16 * duration)
    clips = video.clip_frames(count, 16.0, 5)
    assert [first for first, _ in clips] == [math.ceil(16 * start) for start in starts]
    assert [last for _, last in clips] == [min(math.ceil(16 * (start + 2)), count) - 1 for start in starts]
  assert video.clip_frames(10, None, 5) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
  assert video.clip_frames(1, None, 2) == [[0, 0], [0, 0]]


def test_a_video_is_read_by_its_rate(tmp_path):
  frames = [Image.fromarray(np.full((40, 60, 3), 10 * i, np.uint8)) for i in range(20)]
  path = tmp_path / "film.webp"
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, lossless=True)
  wanted = [[0, 9], [5, 14], [10, 19]]  # 4 s at 5 frames a second
  for source in (path, path.read_bytes()):
    clips = video.read_clips(source, clips=3)
    assert clips.shape == (3, 2, 40, 60, 3)
    assert np.allclose(clips[..., 0, 0, 0], 10 * np.array(wanted), atol=3)
  found = item("video", clips=3)
  prepared = found.prepare(found.read(path))
  assert prepared.shape == (9, 2, 224, 224, 3) and prepared.dtype == np.float32
  with pytest.raises(ValueError, match="no such file or folder"):
    found.read(tmp_path / "no.mp4")


def test_a_film_is_read_by_its_rate(tmp_path):
  av = pytest.importorskip("av")
  path = tmp_path / "film.mp4"
  with av.open(str(path), "w") as out:
    stream = out.add_stream("mpeg4", rate=5)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(20):  # 4 s
      frame = np.full((48, 64, 3), 12 * i, np.uint8)
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    out.mux(stream.encode())
  for source in (path, path.read_bytes()):
    clips = video.read_clips(source, clips=3)
    assert clips.shape == (3, 2, 48, 64, 3)
    assert np.allclose(clips[:, :, 24, 32, 0], 12 * np.array([[0, 9], [5, 14], [10, 19]]), atol=6)


@pytest.mark.parametrize("name", ["syn48k_short", "syn22k_stereo"])
def test_sounds_equal_the_release(name, tmp_path):
  """Another sinc filter than the library's, the first channel alone, and clips that shift each other's mean."""
  arrays = golden("imagebind_sounds")
  pcm, rate = arrays[f"audio/{name}/pcm16"], int(arrays[f"audio/{name}/rate"])
  first = pcm[:, 0].astype(np.float32) / 32768
  ours = audio.sinc_resample(first, rate, 16_000)
  assert len(ours) == arrays[f"audio/{name}/resampled_length"]
  assert error(ours[:1000], arrays[f"audio/{name}/resampled"]) < 2e-5
  path = tmp_path / "sound.wav"
  with wave.open(str(path), "wb") as file:
    file.setparams((pcm.shape[1], 2, rate, 0, "NONE", ""))
    file.writeframes(pcm.tobytes())
  found = item("audio")
  for source in (path, path.read_bytes(), found.read(path)):
    mel = found.prepare(source)
    difference = np.abs(mel[:, ::4] - arrays[f"audio/{name}/mel"])
    assert difference.max() < 2e-4 and difference.mean() < 1e-5
  assert mel.shape == found.shape


def test_sounds_in_arrays_are_taken_at_44_100_hertz():
  tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
  found = item("audio", clips=1)
  other = found.prepare(Sound(tone[:, None], 44_100))
  np.testing.assert_array_equal(found.prepare(tone), other)
  assert other.shape == (1, 128, 204, 1)
  with pytest.raises(ValueError, match="not a readable sound"):
    found.read(b"not a sound")


@pytest.mark.parametrize(("rate", "new"), [(44_100, 16_000), (8_000, 16_000), (44_101, 16_000)])
def test_resampling_keeps_a_tone(rate, new):
  n = np.arange(rate)
  x = np.sin(2 * np.pi * 1000 * n / rate).astype(np.float32)
  y = audio.sinc_resample(x, rate, new)
  assert len(y) == -(-len(x) * new // rate)
  wanted = np.sin(2 * np.pi * 1000 * np.arange(len(y)) / new)
  assert np.abs(y - wanted)[100:-100].max() < 2e-3
  np.testing.assert_array_equal(audio.sinc_resample(x, rate, rate), x)


def test_depth_is_disparity_in_omnivores_units():
  metres = np.full((300, 400), 2.0, np.float32)
  metres[:, :200] = 0.0  # no return
  found = item("depth")
  plane = found.prepare(metres)
  assert plane.shape == (224, 224, 1) and plane.dtype == np.float32
  near = (518.857901 * 0.075 / 2.0 / 75.0 - 0.0418) / 0.0295
  np.testing.assert_allclose(plane[10, -1], near, rtol=1e-5)
  np.testing.assert_allclose(plane[10, 0], (1.0 - 0.0418) / 0.0295, rtol=1e-5)
  other = item("depth", focal_length=100.0, baseline=0.1).prepare(metres)
  np.testing.assert_allclose(other[10, -1], (100 * 0.1 / 2.0 / 75.0 - 0.0418) / 0.0295, rtol=1e-5)


def test_thermal_pictures_of_8_bits_are_taken_as_they_are(tmp_path):
  grey = np.random.default_rng(0).integers(0, 256, (224, 300), np.uint8)
  Image.fromarray(grey).save(tmp_path / "t.png")
  found = item("thermal")
  plane = found.prepare(tmp_path / "t.png")
  np.testing.assert_array_equal(plane[..., 0], grey[:, 38:262])
  np.testing.assert_array_equal(found.prepare(grey), plane)
  celsius = np.full((224, 224), 30.0, np.float32)  # the middle of the scale from 15 to 45 degrees
  assert set(found.prepare(celsius).ravel()) == {127}
  with pytest.raises(ValueError, match="not a readable thermal image"):
    found.prepare(b"nothing")


def test_imu_readings_come_by_channel_or_by_sample(tmp_path):
  readings = np.random.default_rng(0).normal(size=(6, 2000))
  np.save(tmp_path / "imu.npy", readings)
  found = item("imu")
  for source in (readings, readings.T, tmp_path / "imu.npy", (tmp_path / "imu.npy").read_bytes()):
    out = found.prepare(source)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, readings.T.astype(np.float32))
  with pytest.raises(ValueError, match=r"shape \(6, 1999\), allowed are finite numbers of shape \(6, 2000\)"):
    found.prepare(readings[:, 1:])
  (tmp_path / "bad.npy").write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"bad\.npy: not a readable \.npy file"):
    found.read(tmp_path / "bad.npy")


def test_texts_end_with_their_mark_also_when_they_are_cut():
  ids = item("text").prepare("word " * 100)
  assert ids.shape == (77,) and ids[76] == 49407
  assert not item("text").prepare("a dog")[4:].any()


def test_names_of_other_heads_lead_to_the_same_form():
  """A head in a sequence with selection (2), with dropout (3) and in a text's projection (proj.1)."""
  width = 4
  for index in ("1", "2", "3", "proj.1"):
    norm = "proj.0" if index.startswith("proj") else "0"
    arrays = {f"modality_heads.imu.{norm}.weight": np.ones(width), f"modality_heads.imu.{norm}.bias": np.zeros(width),
              f"modality_heads.imu.{index}.weight": np.ones((3, width))}  # fmt: skip
    entries = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}
    tree = {"norm": {"scale": np.zeros(width), "bias": np.zeros(width)}, "proj": {"kernel": np.zeros((width, 3))}}
    found = names.load(tree, Weights(entries, ()), imagebind.head_rules("imu"))
    assert found["proj"]["kernel"].shape == (width, 3) and float(found["norm"]["scale"].sum()) == width


def test_only_the_needed_arrays_of_a_torch_file_are_read(tmp_path, monkeypatch):
  path = tmp_path / "imagebind_huge.pth"
  path.write_bytes(torch_zip(published()))
  opened = open_weights(path)
  read = []
  monkeypatch.setattr(imagebind, "open_weights", lambda path: Weights(
    {n: Entry(e.shape, e.dtype, lambda n=n, e=e: read.append(n) or e.read()) for n, e in opened.items()}, (path,)))
  trunk(path, "depth").params
  assert read and {name.split(".")[1] for name in read} == {"depth"}
