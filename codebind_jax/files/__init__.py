"""Files near and far: paths, files and folders that are replaced whole, copies, checksums, locks between processes.

Far are objects at `gs://` and `s3://`, see `files.far`; near, paths are `pathlib.Path`. On the lowest floor, since all
rooms have files.
"""

from codebind_jax.files.checks import check_space, probe
from codebind_jax.files.checksums import (
  SEAL,
  Checksums,
  array_checksum,
  checksum,
  file_checksum,
  read_sealed,
  sealed,
  sealed_line,
  unsealed,
  unsealed_line,
  verify,
  write_sealed,
)
from codebind_jax.files.copies import cache_folder, fetched
from codebind_jax.files.far import Found, Path, Patience, close, found, is_far, open_far
from codebind_jax.files.jsons import check_form, from_json, read_json
from codebind_jax.files.locks import check_held, held, lock
from codebind_jax.files.places import (
  children,
  contents,
  download,
  exists,
  is_file,
  is_folder,
  make_folder,
  path,
  read_bytes,
  read_text,
  remove,
  remove_folder,
  replace_folder,
  replacing,
  upload,
  write_whole,
)
from codebind_jax.files.temporary import (
  look_once,
  make_scratch,
  remove_left,
  scratch,
  temporary_name,
  writing,
)

__all__ = [
  "Checksums", "Found", "Path", "Patience", "SEAL", "array_checksum", "cache_folder", "check_form", "check_held",
  "check_space", "checksum", "children", "close", "contents", "download", "exists", "fetched", "file_checksum",
  "found", "from_json", "held", "is_far", "is_file", "is_folder", "lock", "look_once", "make_folder", "make_scratch",
  "open_far", "path", "probe", "read_bytes", "read_json", "read_sealed", "read_text", "remove", "remove_folder",
  "remove_left", "replace_folder", "replacing", "scratch", "sealed", "sealed_line", "temporary_name", "unsealed",
  "unsealed_line", "upload", "verify", "write_sealed", "write_whole", "writing",
]  # fmt: skip
