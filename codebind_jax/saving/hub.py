"""Models on the Hugging Face hub, by huggingface_hub (extra `hub`): "hf:org/name[@revision]"."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PREFIX = "hf:"
SECONDS = 10  # for an answer of the hub
_BESIDE = ("*.json", "*.txt", "*.model", "*.yaml", "*.yml")
# Weights of one repository in several forms: the first that is there is taken.
_WEIGHTS = (
  "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
  "open_clip_pytorch_model.safetensors", "*.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
  "open_clip_pytorch_model.bin", "*.npz", "*.pth", "*.pt", "*.bin",
)  # fmt: skip


def library() -> ModuleType:
  """huggingface_hub.

  Raises:
    ValueError: if it is not installed.
  """
  try:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
  except ImportError as error:
    raise ValueError("hf: needs huggingface_hub; install it with pip install 'codebind_jax[hub]'") from error
  return huggingface_hub


def parsed(source: str) -> tuple[str, str | None]:
  """Repository and revision of "hf:org/name[@revision]".

  Raises:
    ValueError: for another form.
  """
  match = re.fullmatch(r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", source)
  if not match:
    raise ValueError(f"{source!r}: allowed is hf:org/name or hf:org/name@revision")
  return match["repo"], match["revision"]


def name_of(path: Path) -> str:
  """The "hf:org/name@revision" of a folder in huggingface_hub's cache; "" for another path."""
  parts = path.parts
  if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
    org_and_name = "/".join(parts[-3].split("--", 2)[1:])
    return f"{PREFIX}{org_and_name}@{parts[-1]}"
  return ""


def needed(files: Sequence[str]) -> list[str]:
  """Those of a repository's files that a model is made of: one form of the weights, and the small files beside them."""
  kept = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in _BESIDE) and
          (file.startswith("trunks/") or "/" not in file) and not file.endswith(".index.json")]  # fmt: skip
  weights = [file for file in files if "/" not in file]
  for pattern in _WEIGHTS:
    found = fnmatch.filter(weights, pattern)
    if found:
      if found[0].endswith(".index.json"):
        stem, ending = found[0].removesuffix(".index.json").rsplit(".", 1)
        found += fnmatch.filter(weights, f"{stem}-*.{ending}")
      return kept + found
  return kept


def fetch(source: str) -> Path:
  """The folder of a model of the hub, downloaded where it is not in the cache yet; only the files that are needed.

  Raises:
    ValueError: if there is no such model, or it is not in the cache and the hub cannot be reached.
  """
  repo, revision = parsed(source)
  hub = library()
  try:
    files = hub.HfApi().repo_info(repo, revision=revision, timeout=SECONDS).siblings
    wanted = needed([file.rfilename for file in files])
    return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, etag_timeout=SECONDS))
  except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
    raise ValueError(f"{source}: the hub has no such model or revision, or it needs a login") from error
  except Exception as error:  # no network, in one of many forms
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
  cached = _cached(Path(hub.constants.HF_HUB_CACHE), repo, revision or "main")
  if cached is None:
    raise ValueError(f"{source}: not in the cache of huggingface_hub, and the hub cannot be reached ({reason})")
  return cached


def _cached(cache: Path, repo: str, revision: str) -> Path | None:
  """The folder of a revision (branch, tag or commit) in huggingface_hub's cache."""
  folder = cache / f"models--{repo.replace('/', '--')}"
  ref = folder / "refs" / revision
  snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
  return snapshot if snapshot.is_dir() else None


def push(folder: Path, name: str, private: bool) -> str:
  """Uploads a folder as the model `name`, which is created where it is not there; gives the address of the commit.

  Raises:
    ValueError: if the name is none, or the hub refuses or cannot be reached.
  """
  if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
    raise ValueError(f"name: got {name!r}; allowed is org/name")
  hub = library()
  try:
    api = hub.HfApi()
    repo = api.create_repo(name, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="A codebind_jax model"))
  except Exception as error:
    raise ValueError(f"{name}: cannot be uploaded ({type(error).__name__}: {error})") from error
