"""Files of the furniture catalogues that the worlds Household and Materials are built from.

Five libraries are zip files in a Debian package; the sixth, `default`, lies in a source archive from PyPI as one zip a
model, with its textures beside them.
"""

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from codebind_jax.data.worlds import archives

DEFAULT, MORE = "sh3d-pip", "sh3d-furniture"
_DEBIAN = "usr/share/sweethome3d/furniture/{}.sh3f"
_DIST = "streamlit_sweethome3d-0.0.6/streamlit_sweethome3d/frontend/dist/"
_MODELS = _DIST + "lib/resources/models/"


def open_libraries(paths: Mapping[str, Path], libraries: Iterable[str]) -> dict[str, zipfile.ZipFile]:
  """Zip files of some libraries of the Debian package, opened in memory; a library that it lacks is absent.

  Args:
    paths: archive of each package.
    libraries: names such as "Scopia".

  Raises:
    ValueError: if an archive is damaged.
  """
  files = {name: _DEBIAN.format(name) for name in libraries}
  contents = archives.read_members(paths[MORE], files.values()) if files else {}
  return {name: _open_zip(contents[inner], inner) for name, inner in files.items() if inner in contents}


def read_default(paths: Mapping[str, Path], inner: Iterable[str]) -> dict[str, bytes]:
  """Files of the default library by their path below its root, such as "lib/resources/textures/x.jpg"."""
  contents = archives.read_members(paths[DEFAULT], [_DIST + name for name in inner])
  return {name.removeprefix(_DIST): data for name, data in contents.items()}


def open_models(paths: Mapping[str, Path], stems: Iterable[str]) -> dict[str, zipfile.ZipFile]:
  """Zip files of models of the default library by stem, opened in memory; a model that it lacks is absent."""
  contents = archives.read_members(paths[DEFAULT], [f"{_MODELS}{stem}.zip" for stem in stems])
  return {name.removeprefix(_MODELS).removesuffix(".zip"): _open_zip(data, name) for name, data in contents.items()}


def _open_zip(data: bytes, name: str) -> zipfile.ZipFile:
  try:
    return zipfile.ZipFile(io.BytesIO(data))
  except zipfile.BadZipFile as error:
    raise ValueError(f"{name}: damaged archive ({error})") from error
