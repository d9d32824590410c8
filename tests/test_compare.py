"""Side by side: the evaluator by hand, the claims' verdicts, and the shipped comparison, shrunk and stopped."""

import json

import numpy as np
import pytest

from codebind_jax import compare as compare_lib
from codebind_jax.compare_report import claims
from codebind_jax.evaluators.crossmodal import code_sharing, recall_at_one, transfer
from configs import compare as shipped


def test_transfer_of_a_head_across_modalities():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 20)
  x = np.eye(4)[labels] + 0.05 * rng.normal(size=(60, 4))
  turned = x @ np.eye(4)[[1, 2, 0, 3]]
  rows, told = {"a": x, "b": turned}, dict.fromkeys("ab", labels)
  found = transfer(rows, rows, told, told)
  assert found["a", "a"] == found["b", "b"] == 100.0
  # The other modality shows every class where this one shows another: a head carries over to nothing.
  assert found["a", "b"] == found["b", "a"] == 0.0


def test_recall_at_one_by_hand():
  a = np.eye(3)
  b = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]])
  # From a all three find their own; of b's rows the second is nearer to a's first.
  assert recall_at_one(a, b) == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_code_sharing_by_hand():
  a, b = np.array([0] * 10 + [1] * 7 + [2] * 3), np.array([3] * 10 + [1] * 7 + [2] * 3)
  # Of codes 0 to 3, two are shared half and half, two are used by one modality alone; 4 is not used.
  assert code_sharing(a, b, 5) == (50.0, 50.0)
  a, b = np.array([0] * 7 + [1]), np.array([0] * 3 + [1] * 5)
  assert code_sharing(a, b, 2) == (50.0, 50.0)
  a, b = np.array([0] * 3), np.array([0])
  assert code_sharing(a, b, 1) == (100.0, 0.0)


def results_of(**means):
  runs = lambda mean: [{"eval/test/label/all": mean + d, "eval/test/style/cross": mean + d} for d in (-1.0, 0.0, 1.0)]
  return {name: {"runs": runs(mean), "toc": {}} for name, mean in means.items()}


def test_claims_are_told_from_the_numbers():
  quality = {"audio": 0.1, "image": 1.0}
  found = claims(results_of(fixed_anchor_audio=40, fixed_anchor_image=60, centrobind=59), quality, "eval/test")
  assert [c["verdict"] for c in found] == ["held", "held", "undecided", "held"]
  found = claims(results_of(fixed_anchor_audio=60, fixed_anchor_image=40, centrobind=30), quality, "eval/test")
  assert {c["verdict"] for c in found} == {"did not hold"}
  assert "anchor audio (quality 0.1) 60.0, anchor image (quality 1) 40.0" in found[0]["numbers"]
  one = {name: result | {"runs": result["runs"][:1]} for name, result in results_of(fixed_anchor_audio=40).items()}
  one |= {"fixed_anchor_image": one["fixed_anchor_audio"]}
  assert {c["verdict"] for c in claims(one, quality, "eval/test")} == {"undecided"}
  toc = {name: {"runs": [], "toc": {"before": before, "after": 0.1}} for name, before in (("x", 0.2), ("y", 0.0))}
  assert claims(toc, {}, "eval/test")[-1]["verdict"] == "undecided"


def small(tmp_path, only=""):
  config = shipped.get_config("runlocal").unlock()
  config.steps, config.batch_size, config.log_steps, config.compare.seeds = 3, 16, 1, 1
  config.compare.learning_rates = (1e-3, 1e-2)
  config.compare.world.rows = 64
  config.data.root = str(tmp_path / "data")
  config.compare.only = only
  for sensor in ("audio", "image"):
    config.model.towers[sensor].body_options.width = 16
  for sensor in ("depth", "video"):
    del config.model.towers[sensor]
    del config.codebook.codes[sensor]
  config.stages.bind.pairs = (("audio", "image"),)
  for name in list(config.compare.variants):
    if name not in ("fixed_anchor_image", "dcid"):
      del config.compare.variants[name]
  config.compare.variants.dcid.options.update({"codes": 8, "club_hidden": 8})
  return config.lock()


@pytest.mark.usefixtures("quick_compiler")
def test_a_comparison_can_be_divided_stopped_and_continued(tmp_path, monkeypatch, capsys):
  calls = []
  real = compare_lib.run_stages

  def counted(config, folder, *rest):
    calls.append(folder.relative_to(tmp_path / "run").as_posix())
    if len(calls) == 4:
      raise KeyboardInterrupt
    return real(config, folder, *rest)

  monkeypatch.setattr(compare_lib, "run_stages", counted)
  first = compare_lib.compare(small(tmp_path, "dcid"), tmp_path / "run")
  assert calls == ["dcid/rate0.001", "dcid/rate0.01", "dcid/seed1"] and set(first["results"]) == {"dcid"}
  assert "without --config.compare.only" in capsys.readouterr().out
  assert not list((tmp_path / "run").glob("comparison.*"))
  with pytest.raises(KeyboardInterrupt):
    compare_lib.compare(small(tmp_path, "fixed_anchor_image"), tmp_path / "run")
  before = (tmp_path / "run/dcid/seed1/metrics.jsonl").read_text()
  # Another process trains the anchor's runs; the call without `only` then has nothing left to train.
  compare_lib.compare(small(tmp_path, "fixed_anchor_image"), tmp_path / "run")
  trained = list(calls)
  compare_lib.compare(small(tmp_path), tmp_path / "run")
  assert calls == trained and trained.count("dcid/seed1") == 1
  assert (tmp_path / "run/dcid/seed1/metrics.jsonl").read_text() == before
  other = small(tmp_path).unlock()
  other.compare.seeds = 2
  with pytest.raises(ValueError, match="compare.seeds: 1 -> 2"):
    compare_lib.compare(other, tmp_path / "run")
  with pytest.raises(ValueError, match="compare.only: 'fcid' is not allowed; allowed: .'dcid', 'fixed_anchor_image'"):
    compare_lib.compare(small(tmp_path, "dcid,fcid"), tmp_path / "run")

  found = json.loads((tmp_path / "run/comparison.json").read_text())
  dcid, anchor = found["results"]["dcid"], found["results"]["fixed_anchor_image"]
  metrics = dcid["runs"][0]
  for kind in ("audio>image", "within", "cross", "all"):
    assert {f"eval/val/label/{kind}", f"eval/test/label/{kind}"} <= set(metrics)
  assert dcid["learning_rate"] == max((0.001, 0.01), key=lambda rate: dcid["tuning"][f"{rate:g}"])
  # Tuning has not read the test set.
  lines = [json.loads(x) for x in (tmp_path / "run/dcid/rate0.01/metrics.jsonl").read_text().splitlines()]
  assert not any(name.startswith("eval/test") for line in lines for name in line)
  assert dcid["cost"]["towers"] == anchor["cost"]["towers"]
  assert anchor["cost"]["aux"] == anchor["cost"]["extra_parameters"] == 0
  assert dcid["cost"]["codebooks"] == 8 * 32 * 2 + 8 + 2 * 8
  text = (tmp_path / "run/comparison.md").read_text()
  assert text in capsys.readouterr().out and "| dcid |" in text and "TOC lowers" in text
  assert all((tmp_path / "run" / name).stat().st_size for name in ("bars.svg", "anchors.svg"))
