"""Writes embeddings and codes of your own data, in any format and of any size, as Parquet shards with ids.

Command: python -m codebind_jax.main --config=configs/embed.py --workdir=OUT --config.init_from=RUN \
             --config.data.files=FILES
The same command continues a stopped run. On several hosts with a shared disk run it on each, with the flags
--coordinator, --num_processes and --process_id where the environment does not give them.
FILES: docs/streaming.md. Time: that of the trunks; the progress bar shows the rate.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Embed
from codebind_jax.data.task import Data


def get_config():
  config = ConfigDict({"mode": "embed", "init_from": "", "data": schema.defaults(Data)})
  config.embed = ConfigDict(schema.defaults(Embed))
  return config.lock()
