"""Formats of records: a module each, with `ENDINGS` and `open_files`; no registry names them.

`open_files(paths, *, cache, max_bad_records, **options) -> list[Source]` makes the index of the files in one pass, or
reads it from the folder `cache` (`index_cache.scanned`); what cannot be parsed is a ValueError that names file and
place. A format that knows its files otherwise than by ending has `takes(path)`.
"""
