"""Formats of records: a module each, with `ENDINGS` and `open_files`; no registry names them.

`open_files(paths, *, max_bad_records, **options)` gives the sources of the files, whose indices it makes in one pass;
what cannot be parsed is a ValueError that names file and place.
"""
