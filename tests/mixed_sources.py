"""One set of coloured squares, a third each in a tar, a Parquet file and JSON lines."""

import io
import json
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from tests.train_fixtures import write_manifest


def write_mixed(folder: pathlib.Path) -> list[str]:
  """The three files."""
  rows = [json.loads(line) for line in write_manifest(folder).read_text().splitlines()]
  content = lambda row: (folder / row["image"]).read_bytes()
  parts = [rows[0::3], rows[1::3], rows[2::3]]
  with tarfile.open(folder / "a.tar", "w") as tar:
    for row in parts[0]:
      fields = json.dumps({key: value for key, value in row.items() if key != "image"}).encode()
      for ending, data in (("png", content(row)), ("json", fields)):
        member = tarfile.TarInfo(f"{row['id']}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  columns = {key: [row[key] for row in parts[1]] for key in ("id", "text", "label", "split")}
  images = [{"bytes": content(row), "path": row["image"]} for row in parts[1]]
  pq.write_table(pa.table(columns | {"image": images}), folder / "b.parquet", row_group_size=4)
  (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts[2]))
  (folder / "squares.jsonl").unlink()
  return [str(folder / name) for name in ("a.tar", "b.parquet", "c.jsonl")]
