"""Stage 5: world Evoked, starting from the folder of the stage before.

Command: python -m codebind_jax.main --config=configs/stage5.py --workdir=runs/stage5 --config.init_from=runs/stage4
"""

from configs import worlds


def get_config(arg=""):
  return worlds.single("evoked", arg)
