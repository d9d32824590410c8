"""The table of official checkpoints, its page, and the command that converts."""

import json
import pathlib

import numpy as np
import pytest
from absl.testing import flagsaver

import codebind_jax
from codebind_jax.tools import convert
from codebind_jax.trunks.families import families
from tests import family_fixtures

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"


def test_the_table_is_that_of_the_page():
  """To renew it: python -m codebind_jax.tools.convert --list, between the marks."""
  inside = PAGE.read_text(encoding="utf-8").split("<!-- list -->\n")[1].split("<!-- end list -->")[0]
  assert inside.splitlines() == convert.table()


def test_every_family_has_official_checkpoints_with_width_and_licence():
  rows = codebind_jax.list_pretrained()
  assert {row.family for row in rows} == set(families())
  assert len({row.name for row in rows}) == len(rows)
  assert all(row.width > 0 and row.licence and row.modalities for row in rows)
  name, family, modalities, width, licence = rows[0]
  assert (name, family, modalities, width, licence) == (
    "hf:openai/clip-vit-base-patch32", "clip", ("image", "text"), 512, "MIT")  # fmt: skip


@pytest.mark.parametrize(("family", "names"), [
  ("clip", ("visual_projection.weight",)), ("siglip", ("vision_model.head.layernorm.weight",)),
  ("dino", ("layernorm.weight", "norm.weight")),
])  # fmt: skip
def test_widths_are_those_of_the_official_shapes(family, names):
  rows = {row.name.rsplit("/", 1)[-1]: row for row in codebind_jax.list_pretrained() if row.name.startswith("hf:")}
  official = {name: model["shapes"] for name, model in family_fixtures.official(family).items()}
  found = 0
  for name, shapes in official.items():
    key = name.rsplit("/", 1)[-1]
    size = key.removeprefix("dinov2-").removesuffix("-with-registers")
    key = {f"dinov2-{size}-with-registers": f"dinov2-with-registers-{size}"}.get(key, key)
    row = rows.get(key) or rows.get(f"{key}-pretrain-lvd1689m")
    tensor = next((shapes[n] for n in names if n in shapes), None)
    if not name.endswith(".npz"):
      assert row and row.family == family and row.width == tensor[0], name
      found += 1
  assert found > 3


@pytest.fixture
def clip(tmp_path):
  return family_fixtures.unpack("clip_hf", tmp_path / "clip")


def run(capsys, *arguments, **options):
  with flagsaver.flagsaver(**options):
    try:
      convert.main(["convert", *map(str, arguments)])
      code = 0
    except SystemExit as end:
      code = end.code
  return code, capsys.readouterr().out


def test_a_checkpoint_is_converted_and_reported(clip, tmp_path, capsys):
  code, out = run(capsys, clip, tmp_path / "out", modalities=["text"])
  assert code == 0 and codebind_jax.load(tmp_path / "out").modalities == ("text",)
  assert "text: clip, " in out and "1 tokens of width 24" in out and "licence: MIT" in out
  assert f"from model.safetensors, SHA-256 {convert.file_hash(clip / 'model.safetensors')}" in out
  assert f"out/model.safetensors: SHA-256 {convert.file_hash(tmp_path / 'out' / 'model.safetensors')}" in out
  code, out = run(capsys, clip, tmp_path / "out", check=True)
  assert code == 0 and "check: image: no recorded embeddings of this checkpoint" in out


def test_recorded_embeddings_are_compared(clip, tmp_path, capsys):
  file = tmp_path / "recorded.json"
  assert run(capsys, clip, tmp_path / "out", record=str(file))[0] == 0
  code, out = run(capsys, clip, tmp_path / "out", check=True, recorded=str(file))
  assert code == 0 and out.count("smallest cosine to the recorded embeddings 1.000000: equal") == 2
  content = json.loads(file.read_text())
  (key,) = content
  assert key == convert.file_hash(clip / "model.safetensors") and np.shape(content[key]["text"]) == (2, 20)
  content[key]["image"][1] = content[key]["image"][1][::-1]
  file.write_text(json.dumps(content))
  code, out = run(capsys, clip, tmp_path / "out", check=True, recorded=str(file))
  assert code == 1 and "check: image: smallest cosine" in out and "DIFFERS" in out


def test_bad_arguments_are_named(clip, tmp_path, capsys):
  assert "needed are IN and OUT" in run(capsys, clip)[0]
  assert "no such file or folder" in run(capsys, tmp_path / "nothing", tmp_path / "out")[0]
  (tmp_path / "bad.json").write_text("[]")
  code, _ = run(capsys, clip, tmp_path / "out", check=True, recorded=str(tmp_path / "bad.json"))
  assert "an object is needed" in code
  code, out = run(capsys, list=True)
  assert code == 0 and out.splitlines() == convert.table()
