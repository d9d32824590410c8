"""Evaluates a trained model on your own data, in any format of docs/streaming.md.

Command: python -m codebind_jax.main --config=configs/eval.py --workdir=DIR --config.init_from=RUN \
             --config.data.files=FILES --config.task=zeroshot|retrieval|probe
Time: seconds, plus the trunks' tokens of new items once.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.data.task import Data


def get_config():
  config = ConfigDict({"mode": "eval", "task": "zeroshot", "init_from": ""})
  config.data = ConfigDict(schema.defaults(Data))
  config.data.eval_templates = ("{}", "an image of {}", "an icon of {}", "a drawing of {}", "a photo of {}")
  return config.lock()
