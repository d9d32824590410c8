"""The claims' verdicts by hand, and the data behind the figures and the tables of a comparison."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest

from codebind_jax import schema
from codebind_jax.compare import figures
from codebind_jax.compare.claims import claims, verdict
from codebind_jax.compare.table import write_comparison
from codebind_jax.methods.base import method_names
from codebind_jax.methods.unified import Unified
from codebind_jax.tools import methods_page

WORLD = {"quality": {"audio": 0.1, "depth": 0.5, "image": 1.0}, "style_quality": {"audio": 0.0}, "styles": 4}


def test_verdict_by_hand():
  # Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, quantile of t with two degrees of freedom 4.3027.
  found = verdict([1.0, 2.0, 3.0])
  assert found["difference"] == 2.0 and found["error"] == pytest.approx(3**-0.5)
  assert found["interval"] == pytest.approx(4.302653 / 3**0.5) and found["seeds"] == 3
  assert found["verdict"] == "undecided"  # 2 - 2.48 is not above 0
  assert verdict([1.0, 2.0, 3.0], allowed=0.5)["verdict"] == "held"  # but above -0.5
  assert verdict([2.0, 2.5, 3.0])["verdict"] == "held" and verdict([-2.0, -2.5, -3.0])["verdict"] == "did not hold"
  assert verdict([-2.0, -2.5, -3.0], allowed=1.0)["verdict"] == "did not hold"
  assert verdict([-0.4, -0.5, -0.6], allowed=1.0)["verdict"] == "held"
  assert verdict([0.0, 0.0])["verdict"] == "undecided"
  one = verdict([9.0])
  assert one["verdict"] == "undecided" and one["error"] is one["interval"] is None


def result(whole=50.0, style=50.0, cross=50.0, toc=None, seeds=(-1.0, 0.0, 1.0)):
  """Runs whose seeds differ much, all methods by the same: what only a paired comparison can see through."""
  names = ("audio", "depth", "image")
  run = lambda d: {
    "eval/test/label/all": whole + 3 * d, "eval/test/label/cross": cross + 3 * d, "codes/shared": 40.0 + d,
    "codes/single": 20.0,
    **{f"eval/test/style/{a}>{b}": (style if "audio" not in (a, b) else 0.0) + d for a in names for b in names},
  }
  probe = lambda d: {} if toc is None else {"toc": {
    "before": 0.3, "after": 0.3 - toc[0], "kept": 3, "of": 4,
    "metrics": {"eval/test/label/cross": cross + 3 * d + toc[1] + 0.1 * d, "eval/test/style/cross": 0.0},
  }}  # fmt: skip
  return {"runs": [run(d) for d in seeds], "probes": [probe(d) for d in seeds], "method": "x", "learning_rate": 1e-3,
          "cost": {"examples_per_second": 1234.4, "compiled_megabytes": 5.25, "towers": 10_000,
                   "extra_parameters": 1_200, "codebooks": 34, "aux": 0}}  # fmt: skip


def told(results, world=WORLD):
  return {c["claim"]: c for c in claims(results, world)}


def test_claims_about_anchors():
  found = told({"fixed_anchor_audio": result(40, 27), "fixed_anchor_depth": result(65, 50),
                "fixed_anchor_image": result(60, 51), "centrobind": result(64.5, 60)})  # fmt: skip
  assert [c["verdict"] for c in found.values()] == ["held"] * 5
  first, no_worse, better, factor, blind = found.values()
  assert first["difference"] == pytest.approx(20.0) and first["error"] == pytest.approx(0.0)
  assert "anchor audio (quality 0.1) 40.0 ± 3.0, anchor depth (quality 0.5) 65.0 ± 3.0" in first["numbers"]
  assert no_worse["difference"] == pytest.approx(-0.5)  # of depth, the best that came out, less than a point worse
  assert better["difference"] == pytest.approx(24.5)
  # Pairs with audio, which lacks the factor, are left out: 60 - 27 among depth and image.
  assert factor["difference"] == pytest.approx(33.0) and "among depth, image" in factor["numbers"]
  assert blind["difference"] == pytest.approx(25.0 + 5.0 - 27.0) and "chance 25.0" in blind["numbers"]

  found = told({"fixed_anchor_audio": result(60, 58), "fixed_anchor_image": result(40, 51),
                "centrobind": result(30, 30)})  # fmt: skip
  assert {c["verdict"] for c in found.values()} == {"did not hold"} and len(found) == 5
  one = {name: result(value, seeds=(0.0,)) for name, value in (("fixed_anchor_audio", 40), ("fixed_anchor_image", 60))}
  assert [c["verdict"] for c in claims(one, WORLD)] == ["undecided"]
  assert claims({"fixed_anchor_audio": result()}, WORLD) == claims({"fixed_anchor_text": result()}, None) == []


def test_claims_where_all_qualities_are_equal():
  graded = {"fixed_anchor_audio": result(40), "fixed_anchor_depth": result(70), "fixed_anchor_image": result(60),
            "centrobind": result(65)}  # fmt: skip
  even = {"fixed_anchor_audio": result(50), "fixed_anchor_depth": result(52), "fixed_anchor_image": result(51),
          "centrobind": result(80)}  # fmt: skip
  world = {"quality": dict.fromkeys(WORLD["quality"], 0.5), "style_quality": {}, "styles": 4}
  against = {"results": graded, "config": {"compare": {"world": WORLD}}}
  no_worse, anchors, lead = claims(even, world, against=against)
  assert "anchor depth 52.0" in no_worse["numbers"]  # of qualities that are equal none is the lowest
  # The worst and the best anchor are those of the graded world by quality: 60 - 40 there, 51 - 50 here.
  assert anchors["difference"] == pytest.approx(19.0) and anchors["verdict"] == "held"
  assert "graded 20.0 ± 0.0, equal 1.0 ± 0.0" in anchors["numbers"]
  assert lead["difference"] == pytest.approx(25.0 - 30.0) and lead["verdict"] == "did not hold"
  # A gap the other way around is a gap as well.
  even["fixed_anchor_image"] = result(15)
  _, anchors, _ = claims(even, world, against=against)
  assert anchors["difference"] == pytest.approx(20.0 - 35.0) and anchors["verdict"] == "did not hold"
  assert len(claims(even, world)) == 1 and claims({}, world, against=against) == []


def test_claims_against_plain_pairs():
  found = told({"info_nce": result(cross=50), "codebind": result(cross=53), "dcid": result(cross=40), "fcid": result()})
  assert [(c["difference"], c["verdict"]) for c in found.values()] == [
    (pytest.approx(3.0), "held"), (pytest.approx(-10.0), "did not hold"), (pytest.approx(0.0), "undecided"),
    (pytest.approx(10.0), "held"),
  ]  # fmt: skip
  assert [claim.split()[0] for claim in found] == ["CodeBind", "DCID", "FCID", "FCID"]
  # Labels of two worlds count alike; where no label is told, whatever is.
  several = lambda *values: {"runs": [dict(zip(
    ("eval/test/a/label/cross", "eval/test/b/label/cross", "eval/test/style/cross", "eval/val/label/cross"), values
  ))] * 2, "probes": [{}] * 2}  # fmt: skip
  (one,) = claims({"info_nce": several(10.0, 20.0, 0.0, 0.0), "codebind": several(20.0, 60.0, 99.0, 99.0)})
  assert one["difference"] == pytest.approx(40.0 - 15.0) and "codebind 40.0" in one["numbers"]
  concept = lambda value: {"runs": [{"eval/test/concept/cross": value}] * 2, "probes": [{}] * 2}
  (one,) = claims({"info_nce": concept(50.0), "codebind": concept(57.0)})
  assert one["difference"] == pytest.approx(7.0)


def test_claims_about_parts_of_dcid():
  found = told({"dcid": result(cross=60), "dcid_no_coding": result(cross=50), "dcid_no_club": result(cross=70),
                "dcid_no_ema_no_reset": result(cross=60)})  # fmt: skip
  verdicts = {claim.split("leaving out ")[1].split(" hurts")[0]: c["verdict"] for claim, c in found.items()}
  assert verdicts == {"the cross-modal prediction or contrast (CPC)": "held", "CLUB": "did not hold",
                      "MM-EMA and reset": "undecided"}  # fmt: skip


def test_claims_about_fcid_beside_dcid():
  found = told({"dcid": result(cross=60), "dcid_no_club": result(cross=70), "fcid": result(cross=50),
                "fcid_both_ways": result(cross=59.5), "fcid_no_club": result(cross=61)}, None)  # fmt: skip
  verdicts = {claim: (c["verdict"], c["difference"]) for claim, c in found.items() if "no worse" in claim}
  assert {claim.split("(")[1]: one for claim, one in verdicts.items()} == {
    "fcid than dcid)": ("did not hold", -10.0), "fcid_both_ways than dcid)": ("held", -0.5),
    "fcid_no_club than dcid_no_club)": ("did not hold", -9.0),
  }  # fmt: skip


def test_claims_about_parts_of_codebind_where_concepts_are_told():
  concept = lambda value: {"runs": [{"eval/test/concept/cross": value}] * 2, "probes": [{}] * 2}
  found = told({"codebind": concept(50.0), "codebind_no_codes": concept(40.0),
                "codebind_no_decomposition": concept(51.0)}, None)  # fmt: skip
  assert {claim.split("leaving out ")[1].split(" hurts")[0]: c["difference"] for claim, c in found.items()} == {
    "the codes (continuous embeddings)": 10.0, "the losses that keep specific parts apart": -1.0
  }  # fmt: skip


def test_claims_about_toc():
  # Redundancy falls by 0.1 and 0.05; accuracy changes by +0.2 and by -0.5 +- 0.1, of which a point is allowed.
  lower, kept = claims({"a": result(toc=(0.1, 0.2)), "b": result(toc=(0.05, -0.5)), "c": result()})
  assert lower["verdict"] == kept["verdict"] == "held" and set(lower["parts"]) == {"a", "b"}
  assert lower["difference"] == pytest.approx(0.075) and kept["parts"]["b"]["difference"] == pytest.approx(-0.5)
  assert kept["parts"]["b"]["error"] == pytest.approx(0.1 / 3**0.5)
  assert "b (3 of 4) 0.300 -> 0.250 held" in lower["numbers"]
  assert claims({"a": result(toc=(0.1, 0.2)), "b": result(toc=(-0.1, -3.0))})[1]["verdict"] == "did not hold"
  assert claims({"a": result(toc=(0.1, 0.2)), "b": result(toc=(0.1, -1.1))})[1]["verdict"] == "undecided"


def test_data_of_the_figures():
  sharing = lambda shared: {"sharing": {"pairs": {"a+b": [shared, 10.0]}, "sets": {"a": 100 - shared, "a+b": shared}}}
  results = {"x": {"probes": [sharing(40.0), sharing(60.0)]}, "y": {"probes": [{}, {}]}}
  names, table = figures.sharing_by_count(results)
  assert names == ["x"] and table.tolist() == [[50.0, 50.0]]
  modalities, pairs = figures.sharing_pairs(figures.with_probe(results, "sharing")["x"])
  assert modalities == ["a", "b"] and pairs[0, 1] == pairs[1, 0] == 50.0 and np.isnan(pairs[0, 0])
  assert figures.redundancy_table({"z": result(toc=(0.1, 0.0))})["z"] == (
    pytest.approx((0.3, 0.0)), pytest.approx((0.2, 0.0))
  )
  # Row 0 sends its mass to code 2, row 1 to code 0, row 2 to codes 1 and 3.
  plan = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 0.5, 0, 0.5]])
  assert figures.plan_columns(plan) == [2, 0, 1, 3]
  points, others = figures.anchor_points(
    {"fixed_anchor_image": result(60), "fixed_anchor_audio": result(40), "dcid": result(70), "dcid_no_club": result(1)},
    WORLD["quality"], "eval/test/label/all",
  )  # fmt: skip
  assert points == [pytest.approx((0.1, 40.0, 3.0)), pytest.approx((1.0, 60.0, 3.0))] and others == {"dcid": 70.0}


def test_claims_under_equal_regularisation():
  def tuned(cross, score):
    return result(cross=cross) | {"tuning": {"0.1": score, "1": None}}

  found = told({
    "info_nce": tuned(50, 40), "info_nce_mixup": tuned(55, 44), "info_nce_dropout": tuned(58, 43),
    "codebind": tuned(60, 52), "codebind_mixup": tuned(54, 50), "codebind_dropout": tuned(59, 51),
  }, None)  # fmt: skip
  start = "CodeBind generalises across modalities better than plain InfoNCE"
  verdicts = {
    claim.removeprefix(start): (c["verdict"], c["difference"]) for claim, c in found.items() if start in claim
  }
  assert verdicts == {
    " of the pairs": ("held", 10.0), ", both with mixup": ("did not hold", -1.0), ", both with dropout": ("held", 1.0),
    # Of plain InfoNCE validation chooses mixup, of CodeBind none.
    ", each with the regularisation that validation chooses for it": ("held", 5.0),
  }


def test_claims_on_inputs_seen_less_well():
  def seen(plain, noisy, hidden):
    found = result()
    for run, d in zip(found["runs"], (-1.0, 0.0, 1.0)):
      run.pop("eval/test/label/cross")
      of_sets = {"plain": plain, "noisy": noisy, "hidden": hidden}
      run.update({f"eval/test/{name}/label/cross": value + 3 * d for name, value in of_sets.items()})
    return found | {"tuning": {"0.1": plain}}

  found = told({"info_nce": seen(50, 30, 20), "info_nce_mixup": seen(52, 28, 25), "codebind": seen(50, 33, 20),
                "codebind_mixup": seen(56, 35, 21)}, None)  # fmt: skip
  start = "CodeBind generalises across modalities better than plain InfoNCE, each with the regularisation that "
  start += "validation chooses for it"
  verdicts = {claim.removeprefix(start): (c["verdict"], c["difference"]) for claim, c in found.items()
              if claim.startswith(start)}  # fmt: skip
  assert verdicts == {
    "": ("held", pytest.approx(7 / 3)), ", on plain inputs": ("held", 4.0), ", on noisy inputs": ("held", 7.0),
    ", on hidden inputs": ("did not hold", -4.0),
  }  # fmt: skip


def test_what_is_written(tmp_path):
  plans = {"modalities": ["a", "b"], "rows": ["k0", "k1"], "plans": {"a": [[1, 0], [0, 1]], "b": [[0.5, 0.5]] * 2}}
  share = {"pairs": {"a+b": [40.0, 10.0]}, "sets": {"a": 60.0, "a+b": 40.0}}
  with_codes = result(60, toc=(0.1, 0.2))
  for probe in with_codes["probes"]:
    probe |= {"sharing": share, "plan": plans}
  settings = {"world": WORLD, "learning_rates": [1e-3], "seeds": 3}
  config = {"compare": settings, "steps": 7, "batch_size": 9, "stages": {"bind": {"sources": {"w": 4, "v": 6}}}}
  results = {"fixed_anchor_audio": result(40), "fixed_anchor_image": with_codes}
  text = write_comparison(tmp_path, {"summary": "a world", "config": config, "results": results})
  assert (tmp_path / "comparison.md").read_text() == text and "7 steps of 4 (w) + 6 (v) rows" in text
  assert "| fixed_anchor_audio | 50.0 ± 3.0 | 40.0 ± 3.0 | 40.0 ± 1.0 / 20.0 ± 0.0 | 0.001 | 1 |" in text
  assert "Nothing is known to have read these test sets before." in text and "In brackets" not in text
  assert "learning rate 0.001 for all, not tuned" in text
  assert "| fixed_anchor_image | 1234 | 5.2 | 1,200 | 34 | 0 |" in text and "towers have 10,000 parameters" in text
  assert "| **held** | 20.00 ± 0.00 | 3 | label/all: anchor audio" in text and "95 % interval" in text
  assert "with whatever ran beside it" in text
  speed = {"examples_per_second": {"fixed_anchor_audio": 77.4, "fixed_anchor_image": 33.6}, "rounds": 5, "steps": 20,
           "load": 1.25, "cores": 2, "device": "cpu"}  # fmt: skip
  timed = write_comparison(tmp_path, {"summary": "a world", "config": config, "results": results, "speed": speed})
  assert "| fixed_anchor_image | 34 | 5.2 |" in timed and "5 turns of 20 steps" in timed and "average 1.2 " in timed
  assert "with whatever ran beside it" not in timed
  text = write_comparison(tmp_path, {"summary": "a world", "config": config, "results": results})
  found = json.loads((tmp_path / "comparison.json").read_text())
  assert [c["verdict"] for c in found["claims"]] == ["held"] * 3 and "Student" in found["rule"]
  for name in ("bars", "anchors", "sharing", "redundancy", "plan_fixed_anchor_image"):
    assert (tmp_path / f"{name}.svg").stat().st_size and f"({name}.svg)" in text

  settings["learning_rates"], settings["read_before"] = [1e-4, 1e-3, 1e-2], "a first look"
  with_codes["learning_rate"] = 1e-2
  with_codes["tuning"] = {"0.0001": 1.0, "0.001": 2.0, "0.01": 3.0}
  results["fixed_anchor_audio"]["tuning"] = {"0.0001": 1.0, "0.001": 3.0, "0.01": None}
  for run in with_codes["runs"]:
    run["eval/test/label/cross_error"] = 4.25
  tuned = write_comparison(tmp_path, {"summary": "a world", "config": config, "results": results})
  assert "| 0.001 | 3 |" in tuned and "| 0.01 † | 3 |" in tuned and "50.0 ± 3.0 (4.2) |" in tuned
  assert "might do better: fixed_anchor_image (highest of 3)." in tuned and "read before: a first look." in tuned
  with_codes["tuning"]["0.03"] = None  # the next one diverged
  assert "†:" not in (again := write_comparison(tmp_path, {"summary": "a", "config": config, "results": results}))
  assert "| 0.01 | 4 |" in again

  # The same tables, entered into a page between marks, twice.
  page = "a\n<!-- results x -->\nbefore\n<!-- end x -->\nb\n<!-- results y -->\n<!-- end y -->\n"
  for _ in range(2):
    page = methods_page.entered(page, "x", methods_page.lines_of(found))
  start, end = "a\n<!-- results x -->\na world.\n", "\n<!-- end x -->\nb\n<!-- results y -->\n<!-- end y -->\n"
  assert page.startswith(start) and page.endswith(end) and "\nbefore\n" not in page
  assert page.count("#### Cost") == 1 and "| fixed_anchor_image | 1234 | 5.2 |" in page
  with pytest.raises(ValueError, match="no marks '<!-- results z -->' .* allowed: .'x', 'y'"):
    methods_page.entered(page, "z", [])


def test_the_page_of_methods_has_a_place_for_every_comparison_and_names_every_method_and_option():
  page = (pathlib.Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
  for name in ("graded", "regularised", "equal", "ablations", "real", "generalise"):
    methods_page.entered(page, name, [])
  for name in method_names():
    section = page.split(f"(`{name}`)")[1].split("\n## ")[0]
    kind = importlib.import_module(f"codebind_jax.methods.{name}").Method
    shared = {f.name for f in dataclasses.fields(Unified)} if name == "fcid" else set()
    for option in schema.keys_of(kind).keys() - shared:
      assert f"`{option}`" in section, (name, option)
