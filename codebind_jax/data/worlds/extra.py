"""Which further pictures of the fetched packages may be trained on: icons whose names mean no unseen concept.

The packages hold thousands of named pictures beyond those that the tables bind to concepts. `tables/extra.json` lists
those that pass `unseen_concept` and have no near-synonym of an unseen concept for a name; they are the split "extra",
for training alone. `codebind_jax.tools.list_extra` wrote the table; tests check every row of it.
"""

import functools

from codebind_jax.data.worlds import names

Words = tuple[str, ...]


def stem(word: str) -> str:
  """A lower-case word without an English plural ending or mute e: "axes", "axe" and "ax" have one stem."""
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
  """Names of each bridge concept: its slug, label, aliases and the labels of its emoji."""
  own = {c: {words(c), words(v["label"])} for c, v in names.concepts().items() if v["split"]}
  for alias, concept in names.table("aliases")["alias"].items():
    if concept in own:
      own[concept].add(words(alias))
  for emoji in names.table("emoji")["emoji"]:
    own[emoji["concept"]].add(words(emoji["label"]))
  return {concept: frozenset(phrases) for concept, phrases in own.items()}


@functools.cache
def _refused() -> tuple[dict[Words, str], frozenset[str]]:
  """(phrase -> the unseen concept that it names, stems of one-word names that no word may begin or end with)."""
  concepts, own = names.concepts(), _own_names()
  unseen = [c for c in own if concepts[c]["split"] != "train"]
  known = {name for c in own if c not in unseen for name in (*own[c], *map(words, concepts[c]["texts"]))}
  phrases = {words(tag): c for c in unseen for tag in concepts[c]["texts"] if words(tag) not in known}
  phrases |= {name: c for c in unseen for name in own[c]}
  parts = frozenset(name[0] for c in unseen for name in own[c] if len(name) == 1 and len(name[0]) > 3)
  return phrases, parts


def unseen_concept(name: str) -> str:
  """The unseen concept, or its word, that a name refers to; "" if the name may be trained on.

  A name is refused if it stands for a val or test concept; if consecutive words of it are a name or alias of one,
  singular or plural ("eagle-emblem"), or a tag that no seen concept has ("ufo" for the flying saucer); or if one of its
  words begins or ends with the name of one ("mountaintop").
  """
  phrases, parts = _refused()
  concept, own = names.to_concept(name), words(name)
  if names.concepts().get(concept, {}).get("split") in ("val", "test"):
    return concept
  spans = (own[a:b] for a in range(len(own)) for b in range(a + 1, len(own) + 1))
  named = next((phrases[span] for span in spans if span in phrases), "")
  inside = (part for word in own for part in parts if word.startswith(part) or word.endswith(part))
  return named or next(inside, "")
