"""Codes beside quantisers: quantisers by hand and by faiss, the search's numbers by hand, the shipped form shrunk."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from codebind_jax.api import load
from codebind_jax.codebook.spec import stages_within
from codebind_jax.compare import quantisers
from codebind_jax.compare import run as compare_lib
from codebind_jax.compare import runs as runs_lib
from codebind_jax.compare import sizes as sizes_lib
from codebind_jax.compare.search import Search
from codebind_jax.compare.sizes_table import best_quantiser, difference, differences
from codebind_jax.config import QUANTISERS
from codebind_jax.config.validation import validate
from codebind_jax.data.task import open_task
from codebind_jax.train import read_config
from codebind_jax.trunks.feeds import Feeder
from configs import compare as shipped
from configs import stage1
from tests.test_quick_forms import shrunk


def rows(count, seed=0):
  """Vectors of width 8 whose dimensions vary together, and by unequal amounts."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(count, 8)) @ np.random.default_rng(9).normal(size=(8, 8))).astype(np.float32)


def error(fitted, x):
  return float(np.mean(np.sum((fitted.decoded(x) - x) ** 2, axis=1)))


@pytest.mark.parametrize("bits, size, parts, stages", [
  (8, 8, 1, 8), (8, 12, 1, 12), (8, 24, 2, 12), (8, 48, 4, 12), (8, 96, 8, 12), (8, 192, 16, 12), (10, 8, 1, 6),
  (10, 12, 1, 9), (10, 24, 2, 9), (10, 48, 3, 12),
])  # fmt: skip
def test_bytes_hold_so_many_codes_in_parts_of_at_most_twelve(bits, size, parts, stages):
  assert stages_within(384, size, bits) == (parts, stages)


def test_a_size_that_holds_no_code_is_named():
  with pytest.raises(ValueError, match="got 1 bytes for codes of 10 bits; allowed: 2 bytes and more"):
    stages_within(384, 1, 10)
  assert stages_within(7, 26, 8) == (7, 3)  # 21 codes: no more divide into parts of a width of 7


def test_what_fits():
  fits = lambda size: {name for name in QUANTISERS if quantisers.fitting(name, 8, size)}
  assert fits(4) == {"sq8", "sq4", "pq", "opq", "rq", "rq10", "lsq"}
  assert fits(8) == {"sq8", "pq", "opq", "rq", "rq10", "lsq"}  # 4 bits of 8 dimensions are 4 bytes
  assert fits(16) == {"float16"} and fits(32) == {"float32"} and fits(3) == {"sq8", "sq4"}
  with pytest.raises(ValueError, match="pq: got 3 bytes for vectors of width 8"):
    quantisers.fit("pq", 3, rows(300))


def test_floats_are_rounded():
  x = rows(5)
  assert np.array_equal(quantisers.fit("float32", 32, x).decoded(x), x)
  half = quantisers.fit("float16", 16, x)
  assert half.item_bytes == 16 and np.array_equal(half.decoded(x), x.astype(np.float16).astype(np.float32))


class TestWithFaiss:
  @pytest.fixture(autouse=True)
  def installed(self):
    pytest.importorskip("faiss", reason="the extra `search` is not installed")

  @pytest.mark.parametrize("name", ["sq8", "sq4", "pq", "opq", "rq", "lsq"])
  def test_bytes_and_seeds(self, name):
    x, fresh = rows(400), rows(50, seed=1)
    fitted = quantisers.fit(name, 2, x, seed=3)
    assert fitted.item_bytes == 2 and fitted.decoded(fresh).shape == (50, 8)
    np.testing.assert_array_equal(quantisers.fit(name, 2, x, seed=3).decoded(fresh), fitted.decoded(fresh))
    # Better than nothing: the mean of the rows.
    assert error(fitted, fresh) < np.mean(np.sum((fresh - x.mean(0)) ** 2, axis=1))
    if name in ("pq", "opq", "rq", "lsq"):
      assert not np.array_equal(quantisers.fit(name, 2, x, seed=4).decoded(fresh), fitted.decoded(fresh))
      with pytest.raises(ValueError, match=f"{name}: got 255 training rows for 2 bytes; allowed: 256 and more"):
        quantisers.fit(name, 2, x[:255])

  def test_codes_of_ten_bits(self):
    x = rows(1500)
    fitted = quantisers.fit("rq10", 4, x, seed=3)
    assert fitted.item_bytes == 4  # three codes, of 30 bits
    assert len(np.unique(fitted.decoded(x), axis=0)) > 1024
    assert error(fitted, x) < error(quantisers.fit("rq", 2, x, seed=3), x)
    with pytest.raises(ValueError, match="rq10: got 1023 training rows for 4 bytes; allowed: 1024 and more"):
      quantisers.fit("rq10", 4, x[:1023])

  def test_eight_bits_a_dimension_by_hand(self):
    x = rows(300)
    low, step = x.min(0), (x.max(0) - x.min(0)) / 255
    found = quantisers.fit("sq8", 8, x).decoded(x)
    assert (np.abs(found - x) <= step * 1.01).all() and np.abs(found - x).max() > 0
    levels = (found - low) / step
    np.testing.assert_allclose(levels - np.floor(levels), 0.5, atol=0.01)  # the middle of each level, as faiss decodes

  def test_few_bytes_of_a_scalar_quantiser_keep_the_first_principal_dimensions(self):
    x = rows(300)
    _, values, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    kept = (x - x.mean(0)) @ axes[:3].T
    want = kept @ axes[:3] + x.mean(0)
    assert values[0] > 2 * values[-1]
    np.testing.assert_allclose(quantisers.fit("sq8", 3, x).decoded(x), want, atol=0.01 * np.abs(kept).max())

  def test_product_quantisation_gives_each_part_its_nearest_code(self):
    x, fitted = rows(600), quantisers.fit("pq", 2, rows(600))
    found = fitted.decoded(x)
    for part in (slice(0, 4), slice(4, 8)):
      codes = np.unique(found[:, part], axis=0)
      assert len(codes) <= 256
      nearest = codes[((x[:, None, part] - codes[None]) ** 2).sum(-1).argmin(1)]
      np.testing.assert_allclose(((x[:, part] - found[:, part]) ** 2).sum(-1), ((x[:, part] - nearest) ** 2).sum(-1),
                                 rtol=1e-3, atol=1e-5)  # fmt: skip

  def test_the_better_ones_are_better(self):
    x = rows(2000)
    errors = {name: error(quantisers.fit(name, 2, x), x) for name in ("pq", "opq", "rq", "lsq")}
    assert errors["opq"] < errors["pq"] and errors["lsq"] < errors["rq"] < errors["pq"], errors


@pytest.fixture(scope="module")
def search(trained):
  """The measure of a tiny run on its validation set, and its vectors there."""
  manifest, _, workdir = trained
  config = dataclasses.replace(read_config(workdir), test=False)
  assert config.data.manifest == str(manifest)
  measure = Search(config, open_task(config.data), Feeder(config.data, config.model.towers))
  model = load(workdir)
  return measure, measure.vectors(model, ("val",))


def test_search_by_hand(search):
  measure, vectors = search
  (test,), table = vectors.sets, vectors.tables["squares_val"]
  image, text = table["image"], table["text"]
  found = measure.measured(vectors)
  assert set(found) == {f"eval/val/{q}/{kind}" for q in ("coded", "uncoded")
                        for kind in ("zeroshot", "r1", "r10", "probe", "score")}  # fmt: skip
  assert np.abs(image["shared"] - image["query"]).max() > 1e-3
  for q, prompts, column in (("coded", vectors.coded, "shared"), ("uncoded", vectors.uncoded, "query")):
    at, templates = {text: n for n, text in enumerate(vectors.prompts)}, measure.config.data.eval_templates
    classes = np.stack([np.mean([prompts[at[t.format(c)]] for t in templates], axis=0) for c in test.candidates])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    told = np.array(test.candidates)[(image["shared"] @ classes.T).argmax(1)]
    assert found[f"eval/val/{q}/zeroshot"] == pytest.approx(100 * np.mean(told == image["label"]))
    recalls = []
    for one, other in ((image, text), (text, image)):
      nearest = (one[column] @ other["shared"].T).argmax(1)
      recalls.append(100 * np.mean(other["label"][nearest] == one["label"]))  # a caption names its only label
    assert found[f"eval/val/{q}/r1"] == pytest.approx(np.mean(recalls))
    assert found[f"eval/val/{q}/score"] == pytest.approx(
      (found[f"eval/val/{q}/zeroshot"] + found[f"eval/val/{q}/r1"]) / 2
    )
  assert found["eval/val/coded/probe"] == found["eval/val/uncoded/probe"]


def test_quantised_vectors_are_items_and_coded_queries_but_not_uncoded_ones(search, trained):
  measure, vectors = search
  flat = vectors.by(lambda m, x: np.ones_like(x))
  assert np.array_equal(flat.uncoded, vectors.uncoded) and np.ptp(flat.coded) == 0
  for name, table in flat.tables.items():
    for m, columns in table.items():
      assert np.allclose(columns["shared"], columns["shared"][0])
      assert np.array_equal(columns["query"], vectors.tables[name][m]["query"])
  assert measure.measured(flat)["eval/val/uncoded/r1"] == 0  # ties count against the model
  same = vectors.by(lambda m, x: 2 * x)
  found = measure.measured(same)
  assert found["eval/val/coded/score"] == found["eval/val/uncoded/score"]
  with pytest.raises(ValueError, match="config.test: got False, but the sets of role 'test' are asked for"):
    measure.vectors(load(trained[2]), ("test",))


def test_rows_to_fit_to_are_distinct(search):
  _, vectors = search
  assert vectors.modalities == ("text", "image") or vectors.modalities == ("image", "text")
  assert len(vectors.rows_of("image")) == len(np.unique(vectors.train["squares"]["image"]["query"], axis=0)) > 4
  assert len(vectors.rows_of("audio")) == 0


def row(name, size, kind, val, test=None):
  test = test or val
  runs = [{"eval/val/uncoded/score": v, "eval/val/coded/score": v - 1, "eval/test/uncoded/score": t,
           "eval/test/coded/score": t} for v, t in zip(val, test)]  # fmt: skip
  return {"name": name, "bytes": size, "kind": kind, "runs": runs}


def test_the_quantiser_of_as_many_bytes_is_chosen_by_validation_and_paired_by_seed():
  table = [row("float32", 1536, "quantiser", [60, 62]), row("pq", 12, "quantiser", [40, 50], [90, 90]),
           row("opq", 12, "quantiser", [46, 48], [30, 40]), row("rq", 8, "quantiser", [10, 10]),
           row("codes_12", 12, "warm", [50, 56], [35, 43]), row("codes_8", 8, "warm", [20, 20])]  # fmt: skip
  assert best_quantiser(table, 12, "uncoded")["name"] == "opq" and best_quantiser(table, 4, "uncoded") is None
  assert best_quantiser(table, 11, "uncoded")["name"] == "rq"
  assert difference(table[4], table[2], "eval/val/uncoded/score") == (6.0, pytest.approx(np.std([4, 8], ddof=1)))
  found = {(one["name"], one["queries"], one["role"]): one for one in differences(table, ("val", "test"))}
  assert len(found) == 8
  one = found["codes_12", "uncoded", "test"]
  assert (one["quantiser"], one["above_quantiser"][0], one["above_float32"][0]) == ("opq", 4.0, -22.0)


def small(tmp_path):
  """The form `bytes`, shrunk: sizes 2 and 4 of width 16, one way to regularise."""
  config = shrunk(shipped.get_config("bytes,runlocal,published"), tmp_path).unlock()
  kept = {name: entry for name, entry in config.compare.variants.items()
          if name in ("info_nce", "info_nce_dropout", "codes_12", "published_12")}  # fmt: skip
  for name, entry in kept.items():
    if not name.startswith("info_nce"):
      entry.codebook.dim, entry.follows = 4, ("info_nce", "info_nce_dropout")
      few = {"start_rows": 64, "dim": 8, "shared_codes": 256, "stages": 2, "beam": 3}
      entry.codebook.update(few if name == "codes_12" else {})
      entry.losses = {"info_nce": 1.0}
  config.compare.variants = kept
  config.compare.bytes.update({"baselines": ("info_nce", "info_nce_dropout"), "sizes": (2, 4),
                               "quantisers": ("float32", "sq8", "pq")})  # fmt: skip
  config.compare.learning_rates, config.compare.seeds = (1e-3,), 2
  return config


@pytest.mark.usefixtures("quick_compiler")
def test_the_shipped_form_goes_on_where_it_stopped_and_reads_the_test_sets_last(tmp_path, monkeypatch, capsys):
  pytest.importorskip("faiss", reason="the extra `search` is not installed")
  calls, real, fits = [], runs_lib.run_stages, []

  def counted(config, folder, *rest):
    calls.append(folder.relative_to(tmp_path / "run").as_posix())
    if len(calls) == 6:
      raise KeyboardInterrupt
    assert not config.test
    return real(config, folder, *rest)

  fit = quantisers.fit
  monkeypatch.setattr(runs_lib, "run_stages", counted)
  monkeypatch.setattr(sizes_lib.quantisers, "fit", lambda *of: fits.append(of[:2]) or fit(*of))
  config = small(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    compare_lib.compare(config.lock(), tmp_path / "run")
  found = compare_lib.compare(config.lock(), tmp_path / "run")
  best = found["baseline"]
  names = ["info_nce/rate0.001", "info_nce_dropout/rate0.001"]
  names += [f"{name}/seed{seed}" for name in (best, "codes_12", "published_12") for seed in (1, 2)]
  assert sorted(set(calls)) == sorted(names) and len(calls) == len(names) + 1  # the stopped one twice
  text = (tmp_path / "run/comparison.md").read_text()
  assert text in capsys.readouterr().out and "test sets" not in text.lower() and "| 4 | codes_12 (warm) |" in text
  rows = {(one["name"], one["bytes"]): one for one in found["results"]}
  assert {("float32", 64), ("sq8, joint", 2), ("pq, joint", 4), ("codes_12", 4), ("published_12", 4)} <= set(rows)
  assert all(len(one["runs"]) == 2 for one in found["results"])
  assert not any(key.startswith("eval/test") for one in found["results"] for run in one["runs"] for key in run)
  # float32 is the baseline as it was measured when it was trained.
  metrics = json.loads((tmp_path / f"run/{best}/seed1/run.json").read_text())["metrics"]
  for key, value in rows["float32", 64]["runs"][0].items():
    assert key == "bytes" or value == pytest.approx(metrics[key]), key
  # Codes start from the baseline's run of the same seed, with its regularisation.
  warm = read_config(tmp_path / "run/codes_12/seed2")
  assert warm.init_from == str(tmp_path / f"run/{best}/seed2") and not warm.test
  assert {tower.dropout for tower in warm.model.towers.values()} == {0.3 if best == "info_nce_dropout" else 0.0}
  assert read_config(tmp_path / "run/published_12/seed2").init_from == ""
  book = warm.codebook
  assert (book.positions, book.stages, book.beam, book.dim) == ("own", 2, 3, 8)

  # Nothing is trained again to read the test sets, and they are read once.
  count, fitted = len(calls), len(fits)
  config.test = True
  tested = compare_lib.compare(config.lock(), tmp_path / "run")
  assert len(calls) == count and len(fits) == 2 * fitted
  again = {(one["name"], one["bytes"]): one for one in tested["results"]}
  for key, one in rows.items():
    for before, after in zip(one["runs"], again[key]["runs"]):
      assert before == {name: value for name, value in after.items() if not name.startswith("eval/test")}
      assert "eval/test/uncoded/score" in after
  assert "## Test sets" in (tmp_path / "run/comparison.md").read_text()
  for checkpoints in (tmp_path / "run").glob("*/*/checkpoints"):
    shutil.rmtree(checkpoints)
  assert compare_lib.compare(config.lock(), tmp_path / "run")["results"] == tested["results"]
  assert len(calls) == count and len(fits) == 2 * fitted


def test_other_forms_of_the_codes_take_as_many_bytes_and_differ_in_what_their_names_say():
  config = validate(shipped.get_config("bytes,12,ablations"))
  books = {name: runs_lib.run_config(config, variant, 1e-3, 0, False) for name, variant in
           config.compare.variants.items() if variant.quantize}  # fmt: skip
  assert {name.removeprefix("codes_12_") for name in books} == {
    "codes_12", "beam", "beam_8_bits", "beam_6_bits", "beam_4_bits", "product", "rotated"
  }  # fmt: skip
  assert all(run.item_bytes["image"][0] == 12 for run in books.values())
  plain = {name: dataclasses.asdict(run.codebook) for name, run in books.items()}
  changed = lambda name: {key for key, value in plain["codes_12"].items() if plain[f"codes_12_{name}"][key] != value}
  assert changed("beam") == {"beam"}
  assert changed("beam_8_bits") == {"beam", "shared_codes", "stages"}
  assert changed("beam_6_bits") == changed("beam_4_bits") == {"beam", "dim", "shared_codes", "stages"}
  assert books["codes_12_beam_8_bits"].codebook.shared_codes == 256
  assert changed("product") == {"dim", "shared_codes", "stages"}
  assert changed("rotated") == changed("product") | {"rotation", "start"}
  for name in ("product", "rotated"):
    book = books[f"codes_12_{name}"].codebook
    assert (book.stages, 384 // book.dim, book.shared_codes, book.positions) == (1, 12, 256, "own")


def test_the_shipped_sizes_are_those_of_the_codes():
  config = validate(shipped.get_config("bytes,trained,published"))
  for name, variant in config.compare.variants.items():
    if not variant.quantize:
      assert (name in config.compare.bytes.baselines) != (name == "continued")
      continue
    run = runs_lib.run_config(config, variant, 1e-3, 0, False)
    kind, size = name.split("_")
    found, = {shared for shared, _ in run.item_bytes.values()}
    assert int(size) in config.compare.bytes.sizes
    if kind == "published":
      assert found == int(size) and run.codebook.distance == stage1.get_config().codebook.distance
    else:  # ten bits a code seldom fill the bytes
      assert 0.9 * int(size) <= found <= int(size) and run.codebook.shared_codes == 1024
      parts, stages = stages_within(384, int(size), 10)
      assert (384 // run.codebook.dim, run.codebook.stages) == (parts, stages)
    assert (variant.learning_rate is None) == (kind != "codes")
  few = shipped.get_config("bytes,24,8,published").compare
  assert few.bytes.sizes == (24, 8) and {name for name in few.variants if "4" in name} == {"codes_24", "published_24"}
  trained = shipped.get_config("bytes,24,trained").compare.variants
  assert trained.trained_24.codebook.gradient == "both" and "gradient" not in trained.codes_24.codebook
  assert trained.trained_24.codebook.stages == trained.codes_24.codebook.stages == 9
  for arg, message in [("bytes,regularised", "'bytes' goes with runlocal, lineage, trained, published, ablations and"),
                       ("bytes,7", "'7'; allowed: .*, 8, 12, 24, 48, 96, 192$"),
                       ("published", "go with bytes alone"), ("lineage", "go with bytes alone"),
                       ("bytes,household", "'household'"), ("real,24", "'24'"),
                       ("bytes,real", "exclude one another")]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      shipped.get_config(arg)


def test_codes_of_a_lineage_start_from_all_its_worlds_at_once():
  config = validate(shipped.get_config("bytes,24,lineage,household,evoked,trained"))
  of = {name: runs_lib.run_config(config, variant, 1e-3, 0, False) for name, variant in config.compare.variants.items()}
  order = lambda name: [stage.name for stage in of[name].ordered]
  assert order("info_nce") == order("info_nce_dropout") == ["bridges", "household", "evoked"]
  for name, steps in [("codes_24", 1), ("trained_24", 100), ("continued", 100)]:
    index, = of[name].ordered
    assert (index.name, index.steps, index.train, index.codes) == ("index", steps, (".*",), (".*",))
    assert dict(index.sources) == {"icons": 256, "household": 128, "evoked": 128}
    assert set(index.pairs) == {pair for stage in of["info_nce"].ordered for pair in stage.pairs}
  codes = of["codes_24"]
  assert len(codes.item_bytes) == 6 and {shared for shared, _ in codes.item_bytes.values()} == {23}
  assert codes.codebook.dims == {"eeg": 64} and codes.codebook.dim == 192  # EEG's specific part is narrower than a code
  assert list(config.emergent) == [("thermal", "points")]


@pytest.mark.parametrize("key, value, message", [
  ("stage_order", ("index",), "compare.variants.info_nce.stage_order: 'index' is not allowed"),
  ("warm", True, "warm: got True, but config.compare.variants.info_nce.follows is empty"),
  ("follows", ("codes_48",), "compare.variants.[a-z_0-9]*.follows: .* is not allowed"),
  ("codebook", {"dims": 3}, "codebook.dims"),
  ("codebook", {"width": 3}, "width"),
])  # fmt: skip
def test_what_a_variant_may_not_be(key, value, message):
  config = shipped.get_config("bytes").unlock()
  config.compare.variants.info_nce[key] = value
  with pytest.raises(ValueError, match=message):
    compare_lib.compare(config.lock(), "/nowhere")
