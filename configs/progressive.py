"""All stages from one command, one lineage of checkpoints: bridges (text, image), then one stage for each world.

Command: python -m codebind_jax.main --config=configs/progressive.py --workdir=runs/progressive
After a colon, with commas between them: `full` for that profile of the data, which alone has video (362 MB of clips);
`runlocal` for the quick form on profile tiny; names of worlds for some of them, as in :full,menagerie,evoked.
An index of few bytes an item, 24 here (docs/codes.md), of all modalities of the continuous model of such a run, by
default the one above:
         ... --config=configs/progressive.py:24 --workdir=runs/small --config.init_from=runs/progressive/baseline
"""

from configs import common, worlds


def get_config(arg=""):
  words, size = common.words_and_size(arg)
  form, chosen = worlds.parse(words, "a number of bytes an item")
  config = worlds.bridges(form)
  worlds.build(config, chosen or list(worlds.STAGES))
  if size:
    worlds.add_index(config)
    for name in config.stage_order:
      del config.stages[name]
    config.stage_order = ("index",)
    common.start_small_index(config, size, "runs/progressive/baseline")
  return config.lock()
