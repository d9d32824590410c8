"""Mean and spread over seeds, by hand."""

from codebind_jax.tools.seeds import table


def test_mean_and_sample_deviation_beside_the_baseline():
  runs = [{"eval/a/top1": 10.0, "baseline/eval/a/top1": 4.0, "train/x": 1.0},
          {"eval/a/top1": 14.0, "baseline/eval/a/top1": 8.0, "train/x": 1.0}]
  assert table(runs).splitlines()[2:] == ["| eval/a/top1 | 12.0 ± 2.8 | 6.0 ± 2.8 | +6.0 ± 0.0 |"]
  assert table(runs[:1]).splitlines()[2:] == ["| eval/a/top1 | 10.0 | 4.0 | +6.0 |"]
  about = {f"eval/a/top1/{end}": 9.0 for end in ("n", "ways", "low", "high")}
  assert table([runs[0] | about, runs[1] | about]) == table(runs)  # what is no score of a seed has no mean
  assert table([{"eval/x": 3.0}]).splitlines()[2:] == ["| eval/x | 3.0 |  |  |"]
