"""The verdict: what a report says in words, on constructed cases whose right answer is known."""

import dataclasses

import numpy as np
import pytest

from codebind_jax.evaluators.intervals import wilson_interval
from codebind_jax.report import paired, verdict
from codebind_jax.report.data import Score


def row(value, baseline, rows, on="set", chance=1.0, subject="image", family="Zero-shot", **more):
  """A row with Wilson's intervals, as of independent rows."""
  other = None if baseline is None else wilson_interval(baseline, rows)
  return Score("Top-1", on, value, baseline, chance, wilson_interval(value, rows), n=rows, family=family,
               subject=subject, baseline_interval=other, **more)  # fmt: skip


def test_the_interval_of_a_difference_of_independent_rows_is_newcombe_s():
  # Newcombe (1998), table II, case a: 56/70 against 48/80, method 10: 0.0524 to 0.3339.
  first, second = wilson_interval(80.0, 70, z=1.959964), wilson_interval(60.0, 80, z=1.959964)
  low, high = verdict.joined_interval(80.0, first, 60.0, second)
  assert (low, high) == pytest.approx((5.24, 33.39), abs=0.005)
  assert verdict.joined_interval(50.0, (40.0, 65.0), 45.0, None) == (-5.0, 20.0)


def test_the_interval_of_a_paired_difference_adds_one_row_to_either_kind():
  # 30 and 10 discordant rows of 200: p = 31/202, 11/202; d = 20/202; half = 1.96 sqrt((42/202 - d^2) / 202).
  own, other = np.arange(200) < 30, np.arange(200) >= 190
  d, half = 20 / 202, 1.96 * np.sqrt((42 / 202 - (20 / 202) ** 2) / 202)
  assert paired.difference_interval(own, other) == pytest.approx((100 * (d - half), 100 * (d + half)))
  assert paired.difference_interval(other, own) == pytest.approx((-100 * (d + half), -100 * (d - half)))
  low, high = paired.difference_interval(np.arange(128) < 4, np.zeros(128, bool))
  assert low < 0 < high, "four rows alone show nothing (McNemar's exact test: p = 0.125)"
  assert paired.difference_interval(np.arange(128) < 8, np.zeros(128, bool))[0] > 0  # p = 0.008
  low, high = paired.difference_interval(np.ones(3, bool), np.ones(3, bool))
  assert low == -high and high > verdict.TELLING, "three rows tell nothing even where all agree"


def test_rows_of_one_concept_widen_the_paired_interval():
  own, other = np.arange(200) < 30, np.arange(200) >= 190
  alone = paired.difference_interval(own, other)
  groups = np.where(own, 0, np.arange(200))  # all that the run gains is one concept
  low, high = paired.difference_interval(own, other, groups)
  assert low < 0 < alone[0] and high > alone[1]
  assert paired.difference_interval(own, other, np.arange(200)) == alone


@pytest.mark.parametrize(
  "score, side",
  [
    (row(60.0, 50.0, 1000), "above"),
    (row(50.0, 60.0, 1000), "below"),
    (row(51.0, 50.0, 1000), "level"),
    (row(60.0, 50.0, 20), "untold"),
    (row(51.0, 50.0, 1000, difference=(0.2, 1.8)), "above"),  # the paired interval decides
    (row(60.0, 50.0, 1000, difference=(-1.0, 21.0)), "untold"),
    (row(60.0, 50.0, 1000, difference=(0.0, 20.0)), "untold"),
    (row(60.0, None, 1000), None),
    (Score("Top-1", "s", 60.0, 50.0), None),
    (Score("Top-1", "s", float("nan"), 50.0, None, (0.0, 1.0)), None),
    (Score("Rank", "s", 14.0, 19.0, interval=(13.0, 15.0), higher_is_better=False), "above"),
  ],
)
def test_a_row_is_judged_by_the_interval_of_its_difference(score, side):
  assert verdict.judged(score) == side


LEVEL = [row(50.0 + d, 50.0, 1000, on) for d, on in ((1.2, "a"), (-0.5, "b"), (0.0, "c"))]


@pytest.mark.parametrize(
  "scores, sentences",
  [
    (LEVEL, ["Zero-shot: level with the baseline on all three sets (largest difference 1.2 points, within the 95 % "
             "interval)."]),
    (LEVEL[:1], ["Zero-shot: level with the baseline on image (a) (difference 1.2 points, within the 95 % interval)."]),
    ([row(60.0, 50.0, 1000, "a"), row(58.0, 50.0, 1000, "b")],
     ["Zero-shot: above the baseline on both sets (by 8.0 to 10.0 points)."]),
    ([row(40.0, 50.0, 1000, "a"), row(40.0, 50.0, 1000, "b")],
     ["Zero-shot: below the baseline on both sets (by 10.0 points)."]),
    ([row(60.0, 50.0, 1000, "a"), row(40.0, 50.0, 1000, "b"), *LEVEL[1:], row(60.0, 50.0, 20, "d")],
     ["Zero-shot: above the baseline on image (a) by 10.0 points; below the baseline on image (b) by 10.0 points; "
      "level on image (b) and image (c); too few rows to tell on image (d)."]),
    ([row(60.0, 50.0, 20, "a"), row(40.0, 50.0, 20, "b", subject="depth")],
     ["Zero-shot: too few rows to tell it from the baseline on both rows."]),
    ([row(60.0, None, 1000, "a"), row(58.0, None, 1000, "b", chance=2.0)],
     ["Zero-shot: above chance on both sets (58.0 to 60.0 %, where a guess has 1.0 to 2.0 %)."]),
    ([row(60.0, None, 1000, "a")], ["Zero-shot: 60.0 % on image (a), where a guess has 1.0 %."]),
    # Bad news.
    ([row(1.2, None, 1000, "a")],
     ["Zero-shot: no better than chance on image (a): 1.2 % of 1,000 rows, a guess has 1.0 %."]),
    ([row(2.0, 1.9, 1000, "a", chance=25.0)],
     ["Zero-shot: level with the baseline on image (a) (difference 0.1 points, within the 95 % interval).",
      "Zero-shot: worse than chance on image (a): 2.0 % of 1,000 rows, a guess has 25.0 %."]),
    ([row(50.0, None, 2, "a", chance=50.0)],
     ["Zero-shot: too few rows to tell it from chance on image (a): 50.0 % of 2 rows, a guess has 50.0 %."]),
    ([row(60.0, None, 1000, "a"), dataclasses.replace(row(60.0, None, 9, "b"), value=float("nan"))],
     ["Zero-shot: 60.0 % on image (a), where a guess has 1.0 %.", "Zero-shot: the value is not finite on image (b)."]),
    ([row(90.0, 10.0, 1000, family="")], []),  # rows that no verdict counts
  ],
)  # fmt: skip
def test_sentences(scores, sentences):
  assert verdict.verdict(scores) == sentences


def test_one_of_many_rows_outside_its_interval_is_called_what_it_may_be():
  many = [row(50.0, 50.0, 1000, f"s{i}") for i in range(19)] + [row(56.0, 50.0, 1000, "luck")]
  (sentence,) = verdict.verdict(many)
  assert sentence == ("Zero-shot: above the baseline on image (luck) by 6.0 points; level on 19 rows. Of 20 "
                      "comparisons about one in 20 lies outside its interval by chance alone.")  # fmt: skip
  assert "chance alone" not in verdict.verdict([*many, *(row(56.0, 50.0, 1000, f"t{i}") for i in range(3))])[0]


def test_nothing_measured_is_said():
  (sentence,) = verdict.verdict([])
  assert sentence.startswith("Nothing was measured: there is no evaluation set, or none has what zero-shot")


def test_collapsed_and_unused_codes_are_said():
  counts = {"shared": np.ones(512), "image": np.array([100, *[0] * 255]), "audio": np.zeros(8)}
  score = row(60.0, None, 1000)
  assert verdict.verdict([score], counts)[1:] == [
    "Codes: codebook image has collapsed: 1.0 of its 256 codes are in effect on the training data.",
    "Codes: no code of codebook audio was used on the training data.",
  ]
  # Two codes used alike are a perplexity of 2: under a tenth of 256, not under a hundredth of 100.
  assert verdict.verdict([score], {"image": np.array([5, 5, *[0] * 254])})[1:]
  assert not verdict.verdict([score], {"image": np.array([5, 5, *[0] * 98])}, alarm_share=0.01)[1:]
