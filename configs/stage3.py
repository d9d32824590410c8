"""Stage 3: world Materials, starting from the folder of the stage before.

Command: python -m codebind_jax.main --config=configs/stage3.py --workdir=runs/stage3 --config.init_from=runs/stage2
"""

from configs import worlds


def get_config(arg=""):
  return worlds.single("materials", arg)
