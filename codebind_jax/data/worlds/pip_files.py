"""Downloads files of Python packages through pip's own index, network and settings, and runs nothing of them.

Command: python -P pip_files.py FOLDER NAME==VERSION FILE sha256:HASH [NAME==VERSION FILE sha256:HASH ...]
`pip download` would run `setup.py`, or a build backend that it fetches unhashed, to learn a source archive's metadata;
here pip's finder says where a file lies and pip's session brings it. A file of another SHA-256 is left as FILE.other.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence

_CHUNK = 1 << 20
_FOUND = ("--no-input", "--disable-pip-version-check", "--no-cache-dir", "--ignore-requires-python", "--timeout=30")


def main(argv: Sequence[str]) -> int:
  """Leaves each file in the folder; what pip cannot find, or bring, is said on stderr and is exit code 1."""
  from pip._internal.commands.download import DownloadCommand

  folder, wanted = argv[0], list(zip(argv[1::3], argv[2::3], argv[3::3], strict=True))

  class Files(DownloadCommand):
    """`pip download` with its options and settings, up to the place of a file and its bytes."""

    def run(self, options, args):
      session = self.get_default_session(options)
      finder = self._build_package_finder(options=options, session=session, ignore_requires_python=True)
      missing = []
      for pinned, file, expected in wanted:
        found = finder.find_all_candidates(pinned.partition("==")[0])
        link = next((one.link for one in found if one.link.filename == file), None)
        if link is None:
          missing.append(f"{file} of {pinned}")
          continue
        with session.get(link.url_without_fragment, stream=True, headers={"Accept-Encoding": "identity"}) as answer:
          answer.raise_for_status()
          part, digest = os.path.join(folder, f"{file}.part"), hashlib.sha256()
          with open(part, "wb") as out:
            for block in answer.iter_content(_CHUNK):
              out.write(block)
              digest.update(block)
          right = f"sha256:{digest.hexdigest()}" == expected
          os.replace(part, os.path.join(folder, file if right else f"{file}.other"))
      if missing:
        sys.stderr.write(f"ERROR: pip's index has no {', no '.join(missing)}\n")
      return 1 if missing else 0

  return Files("download", "").main([*_FOUND, *(pinned for pinned, *_ in wanted)])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
