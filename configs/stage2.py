"""Stage 2: world Household, starting from the folder of the stage before.

Command: python -m codebind_jax.main --config=configs/stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1
"""

from configs import worlds


def get_config(arg=""):
  return worlds.single("household", arg)
