"""Writes embeddings and codes of your own data, a JSONL manifest of any size, as Parquet shards with ids.

Command: python -m codebind_jax.main --config=configs/embed.py --workdir=OUT --config.init_from=RUN \
             --config.data.manifest=FILE.jsonl
The same command continues a stopped run. On several hosts with a shared disk run it on each, with the flags
--coordinator, --num_processes and --process_id where the environment does not give them.
Time: that of the trunks, as for the features of a training run; the progress bar shows the rate.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Embed


def get_config():
  config = ConfigDict({"mode": "embed", "init_from": "", "data": {"manifest": "", "max_bad_records": 0}})
  config.embed = ConfigDict(schema.defaults(Embed))
  return config.lock()
