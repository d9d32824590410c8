"""Which further pictures of the fetched packages may be trained on: icons whose names mean no unseen concept.

The packages hold thousands of named pictures beyond those that the tables bind to concepts. `tables/extra.json` lists
those that pass `unseen_concept` and have no near-synonym of an unseen concept for a name; they are the split "extra",
for training alone. `codebind_jax.tools.list_extra` wrote the table; tests check every row of it.
"""

import functools

from codebind_jax.data.worlds import names

Words = tuple[str, ...]


def stem(word: str) -> str:
  """A lower-case word without the endings of an English plural and a mute e: "axes", "axe" and "ax" are one."""
  if len(word) > 4 and word.endswith("ies"):
    return word[:-3] + "y"
  if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
    word = word[:-1]
  word = word.removesuffix("e") if len(word) > 3 else word
  return word[:-1] + "f" if word.endswith("v") else word


def words(name: str) -> Words:
  """Stems of the words of a name."""
  return tuple(stem(word) for word in names.slug(name).split("-"))


@functools.cache
def _own_names() -> dict[str, frozenset[Words]]:
  """Bridge concept -> its names: slug, label, aliases, labels of its emoji."""
  found = {c: {words(c), words(v["label"])} for c, v in names.concepts().items() if v["split"]}
  for alias, concept in names.table("aliases")["alias"].items():
    if concept in found:
      found[concept].add(words(alias))
  for emoji in names.table("emoji")["emoji"]:
    found[emoji["concept"]].add(words(emoji["label"]))
  return {concept: frozenset(own) for concept, own in found.items()}


@functools.cache
def _refused() -> tuple[dict[Words, str], frozenset[str]]:
  """(words that name an unseen concept -> the concept, stems of such names that may not begin or end a word)."""
  concepts, own = names.concepts(), _own_names()
  unseen = [c for c in own if concepts[c]["split"] != "train"]
  known = {name for c in own if c not in unseen for name in (*own[c], *map(words, concepts[c]["texts"]))}
  phrases = {words(tag): c for c in unseen for tag in concepts[c]["texts"] if words(tag) not in known}
  phrases |= {name: c for c in unseen for name in own[c]}
  parts = frozenset(name[0] for c in unseen for name in own[c] if len(name) == 1 and len(name[0]) > 3)
  return phrases, parts


def unseen_concept(name: str) -> str:
  """The unseen concept, or the word of one, that a name names; "" if it may be trained on.

  Refused are names that stand for a val or test concept; in which words in a row are a name or alias of one, singular
  or plural ("eagle-emblem"), or a tag that no seen concept has ("ufo" for the flying saucer); and in which a word
  begins or ends with the name of one ("mountaintop").
  """
  phrases, parts = _refused()
  concept, own = names.to_concept(name), words(name)
  if names.concepts().get(concept, {}).get("split") in ("val", "test"):
    return concept
  rows = (own[a:b] for a in range(len(own)) for b in range(a + 1, len(own) + 1))
  found = next((phrases[row] for row in rows if row in phrases), "")
  inside = (part for word in own for part in parts if word.startswith(part) or word.endswith(part))
  return found or next(inside, "")
