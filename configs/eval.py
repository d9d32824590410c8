"""Evaluates a trained model on your own data: a JSONL manifest, one record a line, paths relative to it.

Command: python -m codebind_jax.main --config=configs/eval.py --workdir=DIR --config.init_from=RUN \
             --config.data.manifest=FILE.jsonl --config.task=zeroshot|retrieval|probe
Time: seconds, plus the trunks' features of new items once.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict({"mode": "eval", "task": "zeroshot", "init_from": ""})
  config.data = ConfigDict({"root": "", "manifest": "", "worlds": (), "classes": "", "max_bad_records": 0})
  config.data.eval_templates = ("{}", "an image of {}", "an icon of {}", "a drawing of {}", "a photo of {}")
  return config.lock()
