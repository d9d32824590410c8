"""Stage 4: world Menagerie, starting from the folder of the stage before.

Command: python -m codebind_jax.main --config=configs/stage4.py --workdir=runs/stage4 --config.init_from=runs/stage3
"""

from configs import worlds


def get_config(arg=""):
  return worlds.single("menagerie", arg)
