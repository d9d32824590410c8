"""Augmentations of all modalities: what every one keeps, how configs name them, and that none needs JAX."""

import importlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from codebind_jax.data import augment, transforms
from codebind_jax.data.augment.image import Photo, View

RNG = np.random.default_rng(0)
WHOLE = {"area": (1.0, 1.0), "flip": 0.0}
PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
DRAWN = np.full((32, 32, 3), 255, np.uint8)
DRAWN[8:24, 10:20] = RNG.integers(0, 256, (16, 10, 3))
SERIES = RNG.normal(0, 20, (4, 200)).astype(np.float32)
SERIES[0, 3] = -0.0  # which only a sum with 0 would change
STILL_DRAWING = {
  "rotate": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "shear": 0.0, "stretch": 0.0, "flip": 0.0, "background": 0.0,
  "colour": 0.0, "mono": 0.0, "invert": 0.0, "blur": 0.0, "erase": 0.0,
}  # fmt: skip
# (modality, kind): (a decoded value, the settings that leave it as it is)
CASES = {
  ("image", "photo"): (RNG.integers(0, 256, (30, 41, 3)).astype(np.uint8), WHOLE | PLAIN),
  ("image", "drawing"): (DRAWN, STILL_DRAWING),
  ("tactile", "photo"): (RNG.integers(0, 256, (24, 32, 3)).astype(np.uint8), WHOLE | PLAIN),
  ("video", "clip"): (RNG.integers(0, 256, (5, 24, 31, 3)).astype(np.uint8), WHOLE | PLAIN),
  ("audio", "waveform"): (
    RNG.uniform(-1, 1, 3000).astype(np.float32), {"seconds": 0.0, "gain": 0.0, "noise": 0.0, "polarity": 0.0},
  ),
  ("audio", "spectrogram"): (RNG.normal(size=(2, 50, 40)).astype(np.float32), {"time": 0.0, "band": 0.0}),
  ("points", "cloud"): (
    RNG.uniform(0, 1, (60, 6)).astype(np.float32),
    {"turn": 0.0, "tilt": 0.0, "scale": (1.0, 1.0), "jitter": 0.0, "drop": 0.0},
  ),
  ("depth", "depth"): (RNG.uniform(0.5, 9, (40, 52)).astype(np.float32), WHOLE | {"holes": 0.0}),
  ("thermal", "thermal"): (
    RNG.uniform(15, 40, (30, 44)).astype(np.float32), WHOLE | {"gain": (1.0, 1.0), "offset": 0.0}),
  ("eeg", "series"): (SERIES, {"shift": 0.0, "scale": (1.0, 1.0), "noise": 0.0, "drop": 0.0, "mask": 0.0}),
}  # fmt: skip
ALL = pytest.mark.parametrize("modality, kind", list(CASES))


def made(modality, kind, **settings):
  return augment.make(modality, {"kind": kind, **settings})


def bits(array):
  return array.dtype, array.shape, array.tobytes()


def test_every_kind_of_every_modality_is_a_case():
  modules = {name: importlib.import_module(f"codebind_jax.data.augment.{name}") for name in augment.augmented()}
  assert set(CASES) == {(name, kind) for name, module in modules.items() for kind in augment.kinds(module)}
  assert set(modules) == set(transforms.readable()) - {"text"}


def test_a_kind_is_a_public_dataclass_that_can_be_called():
  module = types.ModuleType("new")
  module.Photo, module._Hidden, module.View, module.number = Photo, Photo, View, 3
  assert augment.kinds(module) == {"photo": Photo}


@ALL
def test_a_view_is_a_function_of_the_value_and_the_generator(modality, kind):
  value, _ = CASES[modality, kind]
  value, one = value.copy(), made(modality, kind)
  value.flags.writeable = False
  before = value.tobytes()
  views = [one(value, np.random.default_rng(seed)) for seed in range(12)]
  again = [pickle.loads(pickle.dumps(one))(value, np.random.default_rng(seed)) for seed in range(12)]
  assert list(map(bits, views)) == list(map(bits, again)) and value.tobytes() == before
  assert len({bits(view) for view in views}) >= 10, "seeds differ"
  rng = np.random.default_rng(0)
  assert bits(one(value, rng)) != bits(one(value, rng)), "the next epoch has another view"


@ALL
def test_a_view_is_of_the_values_kind(modality, kind):
  value, _ = CASES[modality, kind]
  for seed in range(20):
    view = made(modality, kind)(value, np.random.default_rng(seed))
    assert view.dtype == value.dtype and view.ndim == value.ndim and view.flags.c_contiguous
    assert np.isfinite(view).all()
    if kind in ("drawing", "spectrogram", "cloud", "series"):
      assert view.shape == value.shape
    if kind != "spectrogram":
      np.testing.assert_array_equal(transforms.of(modality).read(view), view)  # as it is what files give


@ALL
def test_settings_at_zero_give_the_value_bit_for_bit(modality, kind):
  value, still = CASES[modality, kind]
  for seed in range(4):
    assert bits(made(modality, kind, **still)(value, np.random.default_rng(seed))) == bits(value)


@ALL
def test_what_it_does_is_said_by_its_repr(modality, kind):
  _, still = CASES[modality, kind]
  texts = {repr(made(modality, kind)), repr(made(modality, kind, **still))}
  assert len(texts) == 2 and all("revision=" in text and " at 0x" not in text for text in texts)


def test_revisions_differ_also_where_classes_have_one_name():
  assert len({made(*case).revision for case in CASES}) == len(CASES)


def test_a_config_names_kinds_and_fields():
  one = augment.make("image", {"kind": "photo", "area": [0.5, 1], "hue": 0})
  assert one.area == (0.5, 1.0) and one.hue == 0.0 and type(one.area[1]) is float and type(one).__name__ == "Photo"
  assert type(augment.make("image", {"kind": "drawing"})).__name__ == "Drawing"


@pytest.mark.parametrize(
  "modality, settings, said",
  [
    ("text", {"kind": "photo"}, r"config\.model\.towers\.text\.augment: got .*photo.*allowed: none.*'audio', 'depth'"),
    ("image", {}, r"config\.model\.towers\.image\.augment\.kind: must be set.*allowed: \['drawing', 'photo'\]"),
    ("image", {"kind": "Clip"}, r"image\.augment\.kind: 'Clip' is not allowed; allowed: \['drawing', 'photo'\]"),
    ("video", {"kind": "photo"}, r"video\.augment\.kind: 'photo' is not allowed; allowed: \['clip'\]"),
    ("depth", {"kind": "depth", "hue": 0.1}, r"config\.model\.towers\.depth\.augment\.hue: unknown key.*augment\.area"),
    ("image", {"kind": "drawing", "revision": "x"}, r"image\.augment\.revision: unknown key"),
    ("image", {"kind": "photo", "flip": 1.5}, r"towers\.image\.augment\.flip: got 1\.5; allowed: 0 to 1"),
    ("image", {"kind": "photo", "area": (0.5, 0.2)}, r"area: got \(0\.5, 0\.2\); allowed: smallest <= largest"),
    ("image", {"kind": "photo", "area": (0.0, 0.2)}, r"augment\.area: got .* above 0, up to 1"),
    ("image", {"kind": "photo", "area": (0.5, 1.2)}, r"augment\.area: got .* above 0, up to 1"),
    ("image", {"kind": "photo", "aspect": (1.0, float("inf"))}, r"augment\.aspect: got"),
    ("image", {"kind": "photo", "hue": 0.6}, r"augment\.hue: got 0\.6; allowed: 0 to 0\.5"),
    ("image", {"kind": "photo", "brightness": float("nan")}, r"augment\.brightness: got nan"),
    ("points", {"kind": "cloud", "up": "w"}, r"augment\.up: 'w' is not allowed; allowed: \['x', 'y', 'z'\]"),
    ("points", {"kind": "cloud", "drop": 1.0}, r"augment\.drop: got 1\.0; allowed: 0 up to, not including, 1"),
    ("audio", {"kind": "waveform", "snr": (20.0, "loud")}, r"augment\.snr: got 'loud'; allowed: a number"),
    ("audio", {"kind": "waveform", "seconds": -1}, r"seconds: got -1\.0; allowed: 0 \(the whole sound\)"),
    ("eeg", {"kind": "series", "scale": 2.0}, r"augment\.scale: got 2\.0; allowed: a tuple"),
  ],
)  # fmt: skip
def test_bad_settings_name_their_key(modality, settings, said):
  with pytest.raises(ValueError, match=said):
    augment.make(modality, settings)


def test_fields_are_checked_without_a_config_too():
  for modality, kind, name in (("eeg", "series", "drop"), ("depth", "depth", "holes"), ("video", "clip", "hue")):
    with pytest.raises(ValueError, match=rf"^{name}: got 1\.5; allowed"):
      type(made(modality, kind))(**{name: 1.5})


WITHOUT_JAX = """
import pickle, sys
sys.modules["jax"] = None
import numpy as np
for one, value in pickle.load(open(sys.argv[1], "rb")):
  sys.stdout.buffer.write(one(value, np.random.default_rng(5)).tobytes())
"""


def test_views_are_made_where_jax_cannot_be_imported(tmp_path):
  pairs = [(made(*case), value) for case, (value, _) in CASES.items()]
  (tmp_path / "pairs").write_bytes(pickle.dumps(pairs))
  command = [sys.executable, "-c", WITHOUT_JAX, str(tmp_path / "pairs")]
  done = subprocess.run(command, capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr.decode()
  assert done.stdout == b"".join(one(value, np.random.default_rng(5)).tobytes() for one, value in pairs)
