"""Mode `embed`: shards with ids that equal `Model.embed`, divided over processes, restarted, and bad records."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from codebind_jax import config as config_lib
from codebind_jax.api import load
from codebind_jax.config import validation
from codebind_jax.data.task import open_task
from codebind_jax.embedding import job as embed_lib
from codebind_jax.embedding import packing, shards
from codebind_jax.evaluate import Evaluation
from codebind_jax.methods.toc import channel_scores
from codebind_jax.search import Codec, CodeIndex, Index
from codebind_jax.trunks.feeds import Feeder
from configs import embed as embed_config

REPOSITORY = pathlib.Path(__file__).parents[1]
ROWS = 40  # of the tiny manifest


@pytest.fixture(scope="module")
def model(trained):
  return load(trained[2])


def config_of(trained, **overrides):
  config = embed_config.get_config().unlock()
  config.update_from_flattened_dict({
    "init_from": str(trained[2]), "data.manifest": str(trained[0]), "embed.shard_rows": 16, "embed.batch_size": 8,
  })  # fmt: skip
  config.update_from_flattened_dict(overrides)
  return config.lock()


def plan_of(config, folder, model):
  config = config_lib.read(config)
  return embed_lib.make_plan(config.embed, config.data, folder, model)


def manifest_of(folder, trained, lines):
  """A manifest of one's own beside the squares' files."""
  path = folder / "mine.jsonl"
  text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
  path.write_text(text.replace("SQUARES", str(trained[0].parent)))
  return path


def run(plan, model, **processes):
  embed_lib.embed_shards(plan, model, **processes)
  return embed_lib.summarise(plan, "the run")


def table_of(folder):
  """Rows by id; codes unpacked by the report in each file."""
  rows = {}
  for path in shards.shard_files(folder):
    codes = shards.read_report(path).codes
    for row in pq.read_table(path).to_pylist():
      for name, sizes in codes.items():
        if row[name] is not None:
          row[name] = packing.unpack(np.frombuffer(row[name], np.uint8)[None], sizes)[0].tolist()
      rows[row["id"]] = row
  return rows


def test_rows_equal_the_model_s_embeddings(trained, model, tmp_path):
  found = embed_lib.embed(config_of(trained, **{"embed.dtype": "float32"}), tmp_path / "out")
  assert found["rows"] == ROWS and [shard["rows"] for shard in found["shards"]] == [16, 16, 8]
  assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(found))
  rows = table_of(tmp_path / "out")
  lines = [json.loads(line) for line in trained[0].read_text().splitlines()]
  assert list(rows) == [line["id"] for line in lines]
  assert all((rows[line["id"]]["label"], rows[line["id"]]["split"]) == (line["label"], line["split"]) for line in lines)
  direct = model.embed({"image": [trained[0].parent / line["image"] for line in lines],
                        "text": [line["text"][0] for line in lines]})  # fmt: skip
  for modality, expected in direct.items():
    for part, values in expected.asdict().items():
      name = shards.column_name(modality, part)
      if not values.shape[1] or part == "query":  # which is written where it is asked for
        assert name not in rows[lines[0]["id"]]
        continue
      column = np.array([rows[line["id"]][name] for line in lines])
      if part in shards.CODES:
        np.testing.assert_array_equal(column, values)
      else:
        np.testing.assert_allclose(column, values, atol=1e-5)


def test_all_captions_of_a_record_have_a_vector(trained, model, tmp_path):
  records = [{"id": "a", "text": ["red", "a red square", "warm"]}, {"id": "b", "text": "blue"},
             {"id": "c", "image": "SQUARES/red0.png"}]  # fmt: skip
  path = manifest_of(tmp_path, trained, records)
  embed_lib.embed(config_of(trained, **{"data.manifest": str(path), "embed.dtype": "float32"}), tmp_path / "out")
  rows = table_of(tmp_path / "out")
  assert [rows[name]["text_captions"] for name in "abc"] == [["red", "a red square", "warm"], ["blue"], None]
  expected = model.embed({"text": ["red", "a red square", "warm", "blue"]})["text"].shared
  np.testing.assert_allclose(rows["a"]["text_captions_shared"], expected[:3], atol=1e-5)
  np.testing.assert_allclose(rows["b"]["text_captions_shared"], expected[3:], atol=1e-5)
  np.testing.assert_allclose(rows["a"]["text_shared"], expected[0], atol=1e-5)
  assert rows["c"]["text_captions_shared"] is None
  one = {"data.manifest": str(path), "data.captions": "main"}
  embed_lib.embed(config_of(trained, **one), tmp_path / "main")
  assert "text_captions" not in table_of(tmp_path / "main")["a"]


def records_of(kind, folder, trained):
  """The squares in another format; ids and order stay."""
  if kind == "jsonl":
    return trained[0]
  lines = [json.loads(line) for line in trained[0].read_text().splitlines()]
  path = folder / "squares.tar"
  with tarfile.open(path, "w") as archive:
    for line in lines:
      fields = json.dumps({key: line[key] for key in ("id", "text", "label", "split")}).encode()
      picture = (trained[0].parent / line["image"]).read_bytes()
      for name, content in ((f"{line['id']}.json", fields), (line["image"], picture)):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  return path


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_shards_evaluation_and_model_give_one_embedding(trained, tmp_path, kind):
  """Shards: the same bits as of `Model.embed`. Evaluation: those of cached tokens, which are rounded to float16."""
  path = records_of(kind, tmp_path, trained)
  model = load(trained[2])
  data = {"data.manifest": str(path), "data.root": str(tmp_path / "root")}
  options = {"embed.dtype": "float32", "embed.shard_rows": 64, "embed.batch_size": 64}
  plan = plan_of(config_of(trained, **data, **options), tmp_path / "out", model)
  run(plan, model)
  rows = table_of(tmp_path / "out")
  records = [plan.source[row] for row in range(ROWS)]
  raw = [plan.source.read(row, "image") for row in range(ROWS)]
  assert all(isinstance(item, bytes if kind == "tar" else pathlib.Path) for item in raw)
  direct = model.embed({"image": raw, "text": [record["text"][0] for record in records]})
  decoded = model.embed({"image": [record["image"] for record in records]})["image"]
  np.testing.assert_array_equal(decoded.full, direct["image"].full)
  for modality, expected in direct.items():
    for part in rows[records[0]["id"]].keys() & {f"{modality}_{part}" for part in ("shared", "specific", "full")}:
      column = np.array([rows[record["id"]][part] for record in records], np.float32)
      np.testing.assert_array_equal(column, getattr(expected, part.removeprefix(f"{modality}_")))

  settings = dataclasses.replace(model.config, test=True, data=config_lib.read(config_of(trained, **data)).data)
  feeder = Feeder(settings.data, settings.model.towers, model.trunks)
  evaluation = Evaluation(settings, open_task(settings.data), feeder)
  number = {record["id"]: row for row, record in enumerate(records)}
  seen = set()
  tables = [evaluation.train_table(model, "squares")] + [evaluation.table(model, e) for e in evaluation.task.evals]
  for table in tables:
    at = [number[name] for name in table["image"]["id"]]
    seen.update(at)
    np.testing.assert_allclose(table["image"]["full"], direct["image"].full[at], atol=2e-3)
    by_text = {records[row]["text"][0]: row for row in range(ROWS)}
    main = [n for n, caption in enumerate(table["text"]["caption"]) if caption in by_text]
    at = [by_text[caption] for caption in table["text"]["caption"][main]]
    np.testing.assert_allclose(table["text"]["full"][main], direct["text"].full[at], atol=2e-3)
  assert len(seen) == ROWS


def test_command_line_on_two_devices_writes_what_one_device_does(trained, model, tmp_path):
  plan = plan_of(config_of(trained), tmp_path / "here", model)
  run(plan, model)
  command = [sys.executable, "-m", "codebind_jax.main", "--config=configs/embed.py", f"--workdir={tmp_path / 'there'}",
             f"--config.init_from={trained[2]}", f"--config.data.manifest={trained[0]}", "--config.embed.shard_rows=16",
             "--config.embed.batch_size=8"]
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  assert f"{ROWS} rows, 0 bad records left out" in done.stderr
  here, there = table_of(tmp_path / "here"), table_of(tmp_path / "there")
  assert list(here) == list(there)
  for key in here:
    assert here[key]["image_codes_shared"] == there[key]["image_codes_shared"]
    np.testing.assert_allclose(here[key]["image_full"], there[key]["image_full"], atol=1e-3)


def test_a_restart_computes_only_what_is_missing(trained, model, tmp_path, monkeypatch):
  plan = plan_of(config_of(trained, **{"embed.shard_rows": 8}), tmp_path, model)
  real, calls = embed_lib.embed_shard, []

  def stopped(plan, number, model, **options):
    if number == 2:
      # What a kill in the middle of a shard leaves behind: a file under another name.
      plan.path(number).with_suffix(".parquet.1234.part").write_bytes(b"half")
      raise KeyboardInterrupt
    return real(plan, number, model, **options)

  monkeypatch.setattr(embed_lib, "embed_shard", stopped)
  with pytest.raises(KeyboardInterrupt):
    embed_lib.embed_shards(plan, model)
  with pytest.raises(ValueError, match="3 of 5 shards are missing"):
    embed_lib.summarise(plan, "the run")
  with pytest.raises(ValueError, match="2 of 5 shards are finished"):
    Index.from_parquet(tmp_path, "image")
  before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.shard_files(tmp_path)}
  assert len(before) == 2

  monkeypatch.setattr(embed_lib, "embed_shard", lambda plan, n, *a, **k: calls.append(n) or real(plan, n, *a, **k))
  assert run(plan, model)["rows"] == ROWS
  assert calls == [2, 3, 4]
  assert all((path.stat().st_ino, path.stat().st_mtime_ns) == was for path, was in before.items())
  run(plan, model)
  assert calls == [2, 3, 4]
  assert len(table_of(tmp_path)) == ROWS
  assert not list(tmp_path.glob("*.part"))


def test_processes_divide_the_shards_and_write_what_one_does(trained, model, tmp_path):
  plans = [plan_of(config_of(trained, **{"embed.shard_rows": 8}), tmp_path / name, model)
           for name in ("one", "two")]  # fmt: skip
  run(plans[0], model)
  embed_lib.embed_shards(plans[1], model, process=1, processes=2)
  written = {path.name for path in shards.shard_files(tmp_path / "two")}
  assert written == {f"shard-00000{n}-of-000005.parquet" for n in (1, 3)}
  inodes = {path: path.stat().st_ino for path in shards.shard_files(tmp_path / "two")}
  embed_lib.embed_shards(plans[1], model, process=0, processes=2)
  assert all(path.stat().st_ino == inode for path, inode in inodes.items())
  embed_lib.summarise(plans[1], "the run")
  assert table_of(tmp_path / "one") == table_of(tmp_path / "two")


def test_shards_of_another_run_manifest_or_setting_are_an_error(trained, model, tmp_path):
  config = config_of(trained)
  run(plan_of(config, tmp_path, model), model)
  lines = trained[0].read_text().splitlines()[:20]
  manifest = trained[0].with_name("fewer.jsonl")
  manifest.write_text("\n".join(lines))
  changed = load(trained[2])
  shared = changed.codebooks["shared"]
  changed.codebooks["shared"] = shared.replace(codes=np.asarray(shared.codes) + 1e-3)
  plans = [
    plan_of(config_of(trained, **{"data.manifest": str(manifest)}), tmp_path, model),
    plan_of(config_of(trained, **{"embed.shard_rows": 20}), tmp_path, model),
    plan_of(config_of(trained, **{"embed.parts": ("shared",)}), tmp_path, model),
    plan_of(config, tmp_path, changed),
  ]
  for plan in plans:
    with pytest.raises(ValueError, match="belongs to another job"):
      embed_lib.embed_shards(plan, model)
  shards.shard_path(tmp_path, 0, 3).write_bytes(b"PAR1 and then nothing")
  with pytest.raises(ValueError, match="shard-000000-of-000003.parquet is not a shard"):
    embed_lib.embed_shards(plan_of(config, tmp_path, model), model)


BAD = ["{not json", {"image": "missing.png"}, {"image": "SQUARES/squares.jsonl"}, {"audio": "SQUARES/squares.jsonl"}]


def test_bad_records_are_named_counted_and_bounded(trained, model, tmp_path, caplog):
  good = [{"id": "a", "text": "red", "label": "red"}, {"id": "b", "image": "SQUARES/red0.png"},
          {"id": "c", "text": "green", "audio": "SQUARES/squares.jsonl"}, {"text": "blue"}]  # fmt: skip
  # Beside blank lines, which are no records.
  path = manifest_of(tmp_path, trained, [good[0], "", *BAD, "   ", *good[1:]])
  options = {"data.manifest": str(path), "data.root": str(tmp_path), "embed.shard_rows": 3, "embed.batch_size": 2}
  make = lambda allowed: plan_of(
    config_of(trained, **options, **{"data.max_bad_records": allowed}), tmp_path / "out", model
  )
  with pytest.raises(ValueError, match="mine.jsonl:3: not JSON"):
    make(0)
  # A line that is no record is found as the file is opened, and counts before those of shards.
  with pytest.raises(ValueError, match=r"mine.jsonl:4: image: .*missing.png.*\(2 bad records in shard 0, 0 allowed"):
    embed_lib.embed_shards(make(1), model)
  assert not shards.shard_files(tmp_path / "out")
  with pytest.raises(ValueError, match=r"mine.jsonl:6: it has \['audio'\] alone"):
    embed_lib.embed_shards(make(3), model)  # two of them are in its first shard
  assert len(shards.shard_files(tmp_path / "out")) == 1
  with caplog.at_level("WARNING"):
    found = run(make(4), model)
  assert found["rows"] == 4 and found["ignored_modalities"] == {"audio": 1}
  assert [message.split(": ")[0].rsplit(":", 1)[1] for message in found["bad_records"]] == ["3", "4", "5", "6"]
  assert f"left out {path}:3: not JSON" in caplog.text and f"left out {path}:6: it has" in caplog.text
  with pytest.raises(ValueError, match="4 bad records in all, 2 allowed"):
    embed_lib.summarise(make(2), "the run")

  rows = table_of(tmp_path / "out")
  assert set(rows) == {"a", "b", "c", "mine.jsonl:10"}
  assert rows["a"]["image_shared"] is None and rows["a"]["image_codes_specific"] is None
  assert rows["b"]["text_shared"] is None and rows["b"]["label"] is None and rows["a"]["label"] == "red"
  expected = model.embed({"text": ["red"]})["text"]
  np.testing.assert_allclose(rows["a"]["text_shared"], expected.shared[0], atol=1e-3)
  assert rows["a"]["text_codes_shared"] == expected.codes_shared[0].tolist()


def test_an_id_that_two_records_have_is_an_error(trained, model, tmp_path):
  path = manifest_of(tmp_path, trained, [{"id": "a", "text": "red"}, {"text": "blue"}, {"id": "a", "text": "twice"}])
  with pytest.raises(ValueError, match="mine.jsonl:3: id 'a' is there twice, first in line 1"):
    plan_of(config_of(trained, **{"data.manifest": str(path), "data.max_bad_records": 9}), tmp_path / "out", model)


def test_an_embedding_that_is_not_finite_is_a_bad_record(trained, model, tmp_path, monkeypatch):
  real = type(model).embed_rows

  def broken(self, *args, **options):
    found = real(self, *args, **options)
    found.embeddings.full[1] = np.nan
    return found

  monkeypatch.setattr(type(model), "embed_rows", broken)
  path = manifest_of(tmp_path, trained, [{"id": name, "text": name} for name in "abc"])
  plan = plan_of(config_of(trained, **{"data.manifest": str(path), "data.max_bad_records": 1}),
                             tmp_path / "out", model)  # fmt: skip
  assert run(plan, model)["bad_records"] == [f"{path}:2: text: its embedding is not finite"]
  assert list(table_of(tmp_path / "out")) == ["a", "c"]


def test_bad_settings(trained, model, tmp_path):
  for key, value, message in [
    ("embed.modalities", ("smell",), "'smell' is not allowed; allowed: .'image', 'text'"),
    ("embed.parts", ("codes", "whole"), "'whole' is not allowed; allowed"),
  ]:
    with pytest.raises(ValueError, match=message):
      plan_of(config_of(trained, **{key: value}), tmp_path, model)
  (tmp_path / "mine.jsonl").write_text("\n \n")
  with pytest.raises(ValueError, match="no records"):
    plan_of(config_of(trained, **{"data.manifest": str(tmp_path / "mine.jsonl")}), tmp_path, model)
  with pytest.raises(ValueError, match="config.embed.dtype: 'int8' is not allowed"):
    validation.validate(config_of(trained, **{"embed.dtype": "int8"}))
  with pytest.raises(ValueError, match="config.init_from: must be set for mode 'embed'"):
    validation.validate(embed_config.get_config())


def test_index_of_the_shards_finds_what_brute_force_finds(trained, model, tmp_path):
  run(plan_of(config_of(trained), tmp_path, model), model)
  lines = [json.loads(line) for line in trained[0].read_text().splitlines()]
  found = model.embed({"image": [trained[0].parent / line["image"] for line in lines], "text": ["red", "a cow"]})
  for part, query in (("shared", found["text"].shared), ("specific", found["image"].specific[:3]),
                      ("full", found["image"].full[:3])):  # fmt: skip
    index = Index.from_parquet(tmp_path, "image", part)
    assert len(index) == ROWS
    ids, scores = index.search(query, 5)
    cosine = dict(zip([line["id"] for line in lines], (query @ getattr(found["image"], part).T).T))
    np.testing.assert_allclose(scores, -np.sort(-np.stack(list(cosine.values()), axis=1), axis=1)[:, :5], atol=2e-3)
    np.testing.assert_allclose(scores, [[cosine[i][row] for i in own] for row, own in enumerate(ids)], atol=2e-3)
  with pytest.raises(ValueError, match="no column 'text_specific'; allowed: .'image_shared', 'image_specific'"):
    Index.from_parquet(tmp_path, "text", "specific")
  with pytest.raises(ValueError, match="part: got 'codes'"):
    Index.from_parquet(tmp_path, "image", "codes")
  with pytest.raises(ValueError, match="no shards"):
    Index.from_parquet(tmp_path / "nowhere", "image")


def test_codes_are_packed_and_searched_as_the_model_compares(trained, model, tmp_path):
  config = config_of(trained, **{"embed.parts": ("codes", "query"), "embed.dtype": "float32"})
  plan = plan_of(config, tmp_path / "out", model)
  run(plan, model)
  spec = model.method.spec
  for path in shards.shard_files(tmp_path / "out"):
    table = pq.read_table(path)
    for m in ("image", "text"):
      assert table.schema.field(f"{m}_codes_shared").type.byte_width == spec.item_bytes(m)
    assert table.schema.field("image_codes_specific").type.byte_width == spec.item_bytes("image", "specific")
  lines = [json.loads(line) for line in trained[0].read_text().splitlines()]
  found = model.embed({"image": [trained[0].parent / line["image"] for line in lines], "text": ["red", "a cow"]})
  image, text = found["image"], found["text"]
  shared = Codec.of_model(model)
  for codec, codes, vectors in [
    (shared, image.codes_shared, image.shared), (Codec.of_model(model, "full", "image"), image.codes, image.full),
    (Codec.of_model(model, "specific", "image"), image.codes_specific, image.specific),
  ]:  # fmt: skip
    np.testing.assert_allclose(codec.decode(codes), vectors, atol=1e-5)
  index = CodeIndex.from_parquet(tmp_path / "out", shared, "image")
  ids, scores = index.search(text.query, 5)
  cosines = text.query @ image.shared.T
  np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)
  label = lines[0]["label"]
  wanted = {line["id"] for line in lines if line["label"] == label}
  assert set(index.search(text.query, 40, where={"label": label})[0][0]) == wanted
  both = CodeIndex.from_parquet(tmp_path / "out", shared, ["image", "text"])
  assert len(both) == 2 * ROWS and both.fields == ("label", "modality", "split")
  found = both.search(text.query, 5, where={"modality": "image"})[0].tolist()
  assert found == [[f"image:{name}" for name in own] for own in ids]
  vectors = np.concatenate([rows for _, rows in shards.read_column(tmp_path / "out", "image_query")])
  np.testing.assert_allclose(vectors, image.query, atol=1e-5)
  reranked = index.search(text.query, 5, rerank=vectors, candidates=ROWS)[1]
  np.testing.assert_allclose(reranked, -np.sort(-(text.query @ image.query.T), axis=1)[:, :5], atol=1e-5)
  other = Codec(shared.tables[:1] * 2)
  for call, message in [
    (lambda: CodeIndex.from_parquet(tmp_path / "out", other, "image"), "'image_codes_shared' has .* codec 2 of"),
    (lambda: CodeIndex.from_parquet(tmp_path / "out", shared, "smell"), "no column of codes 'smell_codes_shared'"),
    (lambda: CodeIndex.from_parquet(tmp_path / "out", shared, "image", "full"), "part: got 'full'"),
    (lambda: Codec.of_model(model, "specific", "text"), "'text' has no specific part"),
    (lambda: Codec.of_model(model, "specific"), "modality: got ''; allowed"),
    (lambda: Codec.of_model(model, "codes"), "part: got 'codes'"),
  ]:
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.slow
def test_beam_s_local_runner_writes_what_the_mode_does(trained, model, tmp_path):
  pytest.importorskip("apache_beam")
  from codebind_jax.tools.embed_beam import embed_with_beam

  config = config_of(trained)
  plan = plan_of(config, tmp_path / "here", model)
  run(plan, model)
  beside = plan_of(config, tmp_path / "there", model)
  beside.folder.mkdir()
  embed_lib.embed_shard(beside, 1, model)
  inode = beside.path(1).stat().st_ino
  found = embed_with_beam(config, str(beside.folder), ["--runner=DirectRunner"])
  assert beside.path(1).stat().st_ino == inode
  assert found["rows"] == ROWS
  assert table_of(tmp_path / "here") == table_of(tmp_path / "there")


def test_channels_of_a_trained_run_are_chosen_by_the_command(trained, model, tmp_path):
  shutil.copytree(trained[2], tmp_path / "run")
  command = [sys.executable, "-m", "codebind_jax.tools.toc", f"--workdir={tmp_path / 'run'}"]
  found = subprocess.run(
    [*command, "--channels=1", "--evaluate"], cwd=REPOSITORY, capture_output=True, text=True, check=True
  ).stdout
  told = json.loads((tmp_path / "run/toc.json").read_text())
  codes = np.asarray(model.codebooks["shared"].codes)
  best = int(np.argmax(channel_scores(codes)))
  assert told["channels"] == [best] and told["of"] == codes.shape[1] and f"kept 1 of {codes.shape[1]}" in found
  # With one channel a code has a sign alone: of 16 codes p are positive, pairs of one sign have cosine 1, others -1.
  p = int(np.sum(codes[:, best] > 0))
  assert told["redundancy_after"] == pytest.approx(((2 * p - 16) ** 2 - 16) / (16 * 15), abs=1e-6)
  assert told["metrics"] and all(name.startswith("eval/") and f"{name}: " in found for name in told["metrics"])
  failed = subprocess.run([*command, "--channels=99"], cwd=REPOSITORY, capture_output=True, text=True)
  assert failed.returncode == 1 and f"error: --channels: got 99; allowed: 0 to {codes.shape[1]}" in failed.stderr
