"""Writes embeddings and codes of your own data, a JSONL manifest of any size, as Parquet shards with ids.

Command: python -m codebind_jax.main --config=configs/embed.py --workdir=OUT --config.init_from=RUN \
             --config.data.manifest=FILE.jsonl
The same command goes on where it was stopped. On several hosts with a disk in common run it on each, with the flags
--coordinator, --num_processes and --process_id where these are not known otherwise.
Time: that of the trunks, as for the features of a training run; the bar shows the rate.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.mode = "embed"
  config.init_from = ""  # workdir of a training run
  config.data = ConfigDict()
  config.data.manifest = ""
  config.data.max_bad_records = 0  # in all; each is named in the log and in summary.json

  config.embed = ConfigDict()
  config.embed.shard_rows = 16384  # records of the manifest a shard
  config.embed.dtype = "float16"  # of the vectors: float16 or float32
  config.embed.parts = ("shared", "specific", "full", "codes")  # what is written of every modality
  config.embed.modalities = ()  # all of the run's unless given
  config.embed.batch_size = 256  # records held in memory, decoded, at once (twice: the next ones are being read)
  config.embed.threads = 4  # that read and decode
  return config.lock()
