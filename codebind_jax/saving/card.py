"""The model card of a saved model: what it embeds, how it loads, and the licence of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# How the front matter of a model card names a licence -> how texts of licences begin.
_LICENCES = {"mit": "MIT", "apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC-BY-NC 4.0", "cc-by-4.0": "CC-BY-4.0",
             "cc0-1.0": "CC0"}

_EXAMPLES = {"text": '"a dog barking"', "image": '"dog.png"', "audio": '"dog.wav"'}


def licence_id(licences: list[str]) -> str:
  """The one licence of all parts by the name that model cards give it; "other" for several, or for one without name.

  >>> licence_id(["MIT (OpenAI's weights)", "MIT"]), licence_id(["MIT", ""])
  ('mit', 'other')
  """
  ids = {next((key for key, start in _LICENCES.items() if text.replace("CC BY", "CC-BY").startswith(start)), "other")
         for text in licences}  # fmt: skip
  return ids.pop() if len(ids) == 1 else "other"


def card(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
  """Text of the model card.

  Args:
    content: of the saved model's config.json.
    shapes: path -> shape of its arrays.
    name: of the folder, or on the hub.
  """
  model, trunks = content["config"]["model"], content["trunks"]
  modalities, embeds = content["modalities"], ", ".join(content["modalities"])
  example = next((m for m in modalities if m in _EXAMPLES), "")
  lines = [
    "---", "library_name: codebind_jax", f"license: {licence_id([trunk['licence'] for trunk in trunks.values()])}",
    "tags:", "- codebind_jax", "- feature-extraction", *(f"- {m}" for m in modalities), "---", "", f"# {name}", "",
    f"Embeddings of {embeds} in one space of {model['shared_dim']} values, compared by cosine.", "",
    "```python", "import codebind_jax", "", f'model = codebind_jax.load("{name}")',
    *([f'embeddings = model.embed({{"{example}": [{_EXAMPLES[example]}]}})["{example}"].shared'] if example else []),
    "```", "", *([] if name.startswith("hf:") else ["`load` takes the path of this folder.", ""]),
    "| modality | trunk | parameters | shared | specific | values | licence of the trunk |",
    "|---|---|---|---|---|---|---|",
  ]  # fmt: skip
  for m in modalities:
    trunk, tower = trunks[m], model["towers"][m]
    place = trunk.get("source") or "the packaged checkpoint"
    values = "in this folder" if trunk["values"] == "included" else f"of {place}"
    lines.append(f"| {m} | {trunk['family']} | {trunk['parameters']:,} | {model['shared_dim']} | "
                 f"{tower.get('specific_dim', 0)} | {values} | {trunk['licence'] or 'not stated'} |")  # fmt: skip
  books = {path.split("/")[1]: shape for path, shape in shapes.items()
           if path.startswith("codebooks/") and path.endswith("/codes")}  # fmt: skip
  if books:
    lines += ["", "| codebook | codes | width |", "|---|---|---|"]
    lines += [f"| {book} | {math.prod(shape[:-1])} | {shape[-1]} |" for book, shape in sorted(books.items())]
  referred = {m: trunk["checkpoints"] for m, trunk in trunks.items() if trunk["values"] == "reference"}
  if referred:
    lines += ["", "Trunks that are not in this folder are read from their own checkpoints, of these SHA-256:", ""]
    lines += [f"- {m}: `{file}` {value}" for m, files in referred.items() for file, value in files.items()]
  lines += ["", f"Written by codebind_jax {content['version']}. Arrays are in `model.safetensors`; `trunks/` has the"
            " tokenizers and preparation of the trunks, and the shapes of their checkpoints.", ""]  # fmt: skip
  return "\n".join(lines)
