"""All stages from one command, one lineage of checkpoints: bridges (text, image), then one stage for each world.

Command: python -m codebind_jax.main --config=configs/progressive.py --workdir=runs/progressive
After a colon, with commas between them: `full` for that profile of the data, which alone has video (362 MB of clips);
`runlocal` for the quick form on profile tiny; names of worlds for some of them, as in :full,menagerie,evoked; `joint`
for a last stage on all pairs and worlds at once, in which every head and codebook learns (docs/stages.md).
An index of few bytes an item, 24 here (docs/codes.md), of all modalities of the continuous model of such a run, by
default the one above:
         ... --config=configs/progressive.py:24 --workdir=runs/small --config.init_from=runs/progressive/baseline
"""

from configs import common, worlds


def get_config(arg=""):
  words, size = common.words_and_size(arg)
  joint = "joint" in words
  form, chosen = worlds.parse([word for word in words if word != "joint"], "joint", "a number of bytes an item")
  if joint and size:
    raise ValueError(f"configs/progressive.py:{arg}: 'joint' goes without a number of bytes")
  config = worlds.bridges(form)
  worlds.build(config, chosen or list(worlds.STAGES))
  if joint:
    worlds.add_joint(config, "joint", losses=worlds.LOSSES, steps=max(1, config.steps // 3))
    config.stage_order = (*config.stage_order, "joint")
  if size:
    worlds.add_index(config)
    for name in config.stage_order:
      del config.stages[name]
    config.stage_order = ("index",)
    common.start_small_index(config, size, "runs/progressive/baseline")
  return config.lock()
