"""Formats of records: a module each, with `ENDINGS` and `open_files`; no registry names them.

`open_files(paths, *, cache, max_bad_records, **options) -> Source` makes the index of the files in one pass, or reads it
from the folder `cache`; what cannot be parsed is a ValueError that names file and place.
"""
