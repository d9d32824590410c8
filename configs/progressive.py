"""All stages from one command, one lineage of checkpoints: bridges (text, image), then one stage for each world.

Command: python -m codebind_jax.main --config=configs/progressive.py --workdir=runs/progressive
After a colon, with commas between them: `full` for that profile of the data, which alone has video (362 MB of clips);
`runlocal` for the quick form on profile tiny; names of worlds for some of them, as in :full,menagerie,evoked.
"""

from configs import worlds


def get_config(arg=""):
  form, chosen = worlds.parse(arg)
  config = worlds.bridges(form)
  worlds.build(config, chosen or list(worlds.STAGES))
  return config.lock()
