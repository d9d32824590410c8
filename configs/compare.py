"""The methods side by side: same towers, data and steps, a learning rate chosen for each on the validation sets.

Command: python -m codebind_jax.main --config=configs/compare.py --workdir=runs/compare
         configs/compare.py              the synthetic world, with modalities of graded quality
         configs/compare.py:real         Household and Menagerie, rows of both in every step
         configs/compare.py:generalise   heads transferred between sounds, pictures and names (Icons and Menagerie)
         configs/compare.py:equal        the synthetic world with equal qualities, fixed anchors and CentroBind alone;
                                         --config.compare.against=runs/compare/comparison.json adds claims about both
         configs/compare.py:hard         the synthetic world, tested also on noisy inputs and on inputs half of whose
                                         values are hidden; with --config.compare.world.per_class=4
                                         --config.batch_size=40 from four training rows of a class
         configs/compare.py:unified      the synthetic world: DCID and FCID, and what tells them apart
         configs/compare.py:bytes        Icons: codes of 8 to 192 bytes an item beside quantisers of faiss, which
                                         the extra `search` installs; --config.test=True measures the test sets last
After a further comma: `ablations` for DCID and CodeBind without their parts (after `bytes`, for other forms of the
codes of the small index), `regularised` for plain InfoNCE and CodeBind alone, each with mixup, dropout and weight
decay, `runlocal` for a quick look (one seed, no tuning, little data), `full` (generalise alone) for that profile of the
data, which has clips; after `bytes`, some of its sizes, `trained` and `published` for such codes beside those of the
small index, and `lineage` for the packaged worlds of all modalities, bound one after the other, in place of Icons
alone; names of worlds for some of them, as in :bytes,lineage,household.
Writes comparison.md, comparison.json and figures; a second run of the command continues the first.
Several processes, or machines that share the folder, can each take some variants; the plain command then collects:
         ... --workdir=runs/compare --config.compare.only=dcid,fcid
         ... --workdir=runs/compare --config.compare.timing=50  # times the steps of all variants for the table of costs
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Compare, Variant
from configs import common, compare_worlds, worlds

QUALITY = {"audio": 0.15, "depth": 0.35, "video": 0.6, "image": 1.0}
CODEBIND = {"info_nce": 1.0, "commitment": 10.0, "code_matching": 0.05, "decomposition": 0.1, "specific_uniform": 1.0}
# Ways to regularise that need no codes; plain InfoNCE and CodeBind are compared under each.
REGULARISED = {"mixup": {"mixup": 1.0}, "dropout": {"dropout": 0.3}, "weight_decay": {"weight_decay": 1.0}}
WORLDS = ("real", "generalise", "equal", "hard", "unified", "bytes")
FORMS = ("runlocal", "ablations", "regularised", "full", "published", "trained", "lineage")


def variant(method="codebind", quantize=True, losses=None, *, regularised=(), **options):
  entry = ConfigDict(schema.defaults(Variant) | dict(regularised))
  entry.method, entry.quantize, entry.options = method, quantize, ConfigDict(options)
  entry.losses = ConfigDict(losses or ({"info_nce": 1.0} if method == "codebind" else {}))
  return entry


def methods(anchors, hub, codebind, codes, codis, queue):
  """All methods as variants, with several fixed anchors and two forms of CentroBind."""
  # Codes that follow within the 300 to 400 steps of a run, as far a batch as in the release's published runs.
  unified = {"codes": codes, "reduce": "mean", "reset_after": 50, "decay": 0.9}
  return {
    "info_nce": variant(quantize=False), "codebind": variant(losses=codebind),
    **{f"fixed_anchor_{m}": variant("fixed_anchor", anchor=m, frozen=False) for m in anchors},
    "centrobind": variant("centrobind"), "centrobind_views": variant("centrobind", noise=0.3),
    "codis": variant("codis", codes=codis, queue=queue), "dcid": variant("dcid", **unified),
    "fcid": variant("fcid", hub=hub, **unified),
  }  # fmt: skip


def regularised(variants):
  """Plain InfoNCE and CodeBind, and each with mixup, with dropout and with strong weight decay."""
  found = {}
  for name in ("info_nce", "codebind"):
    plain = variants[name]
    found[name] = plain
    for way, settings in REGULARISED.items():
      found[f"{name}_{way}"] = variant(
        quantize=plain.quantize, losses=plain.losses.to_dict(), regularised=settings, **plain.options.to_dict()
      )
  return found


def without_parts(dcid, codebind):
  """DCID and CodeBind, and variants of both without one of their parts."""
  off = {
    "no_coding": {"coding": 0.0}, "no_club": {"club": 0.0}, "no_matching": {"matching": 0.0},
    "no_ema": {"own": 1.0}, "no_reset": {"reset_after": 0}, "no_ema_no_reset": {"own": 1.0, "reset_after": 0},
  }
  options, losses = dcid.options.to_dict(), codebind.losses.to_dict()
  split = ("decomposition", "specific_uniform")
  of_codes = {name for name in losses if name.startswith("code_")}
  kept = lambda *dropped: variant(losses={name: weight for name, weight in losses.items() if name not in dropped})
  continuous = {"info_nce": 1.0} | {name: losses[name] for name in split if name in losses}
  return {
    "dcid": dcid, **{f"dcid_{name}": variant("dcid", **options | change) for name, change in off.items()},
    "codebind": codebind, "codebind_no_codes": variant(quantize=False, losses=continuous),
    "codebind_no_code_terms": kept(*of_codes), "codebind_no_decomposition": kept(*split),
  }  # fmt: skip


def graded(form):
  """The synthetic world: four sensors that show the class by graded shares."""
  config = common.get_config()
  config.mode = "compare"
  config.steps = 60 if form == "runlocal" else 400
  config.batch_size = 128
  config.log_steps = 50
  config.eval_steps = config.checkpoint_steps = 1000  # at the end
  config.data.worlds = ("synthetic",)
  config.model.shared_dim = 32
  config.codebook.dim = 4
  config.codebook.distance = "l2"
  config.codebook.normalize = False
  config.codebook.shared_codes = 256
  for sensor in QUALITY:
    config.model.towers[sensor] = common.tower(
      "mlp", options={"inputs": 64, "modality": sensor, "width": 128}, cache=False, specific_dim=32
    )
    config.codebook.codes[sensor] = 64
  pairs = tuple((a, b) for a in QUALITY for b in QUALITY if a < b)
  config.stages.bind = common.stage(config, pairs=pairs, temperature=0.1, unique_labels=False, code_rows=8)
  config.stage_order = ("bind",)

  config.compare = ConfigDict(schema.defaults(Compare))
  config.compare.seeds = 1 if form == "runlocal" else 3
  config.compare.widen = 0 if form == "runlocal" else 2
  config.compare.learning_rates = (2e-3,) if form == "runlocal" else (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
  config.compare.fields = ("label", "style")
  # The modality of lowest quality does not show the style at all: a factor that an anchor can lack.
  config.compare.world = ConfigDict({
    "classes": 10, "styles": 4, "noise": 0.8, "rows": 512 if form == "runlocal" else 2048, "seed": 0,
    "quality": QUALITY, "style_quality": {"audio": 0.0},
  })  # fmt: skip
  variants = methods(QUALITY, "image", CODEBIND, 64, 64, 512)
  if form == "runlocal":
    for name in ("fixed_anchor_depth", "fixed_anchor_video", "centrobind_views"):
      del variants[name]
  return config, variants


def equal(form):
  """Fixed anchors and CentroBind; every sensor shows the class with the mean of the graded qualities, and the style."""
  config, variants = graded(form)
  config.compare.world.quality = ConfigDict(dict.fromkeys(QUALITY, round(sum(QUALITY.values()) / len(QUALITY), 4)))
  config.compare.world.style_quality = ConfigDict()
  return config, {name: v for name, v in variants.items() if name == "centrobind" or v.method == "fixed_anchor"}


def hard(form):
  """Plain InfoNCE and CodeBind, each with mixup and weight decay, also on noisy and on half hidden inputs.

  Heads are learned on clean ones.
  """
  config, variants = graded(form)
  config.compare.world.per_class = 0
  config.compare.world.noisy = 2 * config.compare.world.noise
  config.compare.world.hidden = 0.5
  seen = {"plain": "", "noisy": "_noisy", "hidden": "_hidden"}
  config.compare.transfers = ConfigDict({
    name: compare_worlds.transfer(("synthetic",), ("label",), (f"synthetic_val{ending}",), (f"synthetic_test{ending}",))
    for name, ending in seen.items()
  })  # fmt: skip
  config.compare.score = "eval/val/plain/label/cross"
  if form != "runlocal":
    config.compare.learning_rates = (3e-3, 1e-2, 3e-2, 0.1)
  config.compare.columns = tuple(f"{name}/label/cross" for name in seen)
  return config, {name: entry for name, entry in regularised(variants).items() if not name.endswith("_dropout")}


def unified(form):
  """DCID and FCID with and without CLUB; FCID with its contrast in both directions, and with the poorest hub."""
  config, variants = graded(form)
  dcid, fcid = (variants[name].options.to_dict() for name in ("dcid", "fcid"))
  both = {"both_ways": True}
  changes = {"": {}, "_no_club": {"club": 0.0}, "_both_ways": both, "_both_ways_no_club": both | {"club": 0.0},
             "_hub_audio": {"hub": "audio"}}  # fmt: skip
  if form != "runlocal":
    config.compare.learning_rates = (1e-2, 3e-2, 0.1)
  return config, {
    "dcid": variants["dcid"], "dcid_no_club": variant("dcid", **dcid | {"club": 0.0}),
    **{f"fcid{name}": variant("fcid", **fcid | change) for name, change in changes.items()},
  }  # fmt: skip


DRAWN = {"equal": equal, "hard": hard, "unified": unified}


def forms_of_codes(model, size):
  """Other forms of the codes of the small index in as many bytes: name -> section `codebook`.

  Found by a beam of 16 sums, of 10 bits and of fewer; product codes of 8 bits in place of residual ones, and rotated.
  """
  width = model.shared_dim // size
  product = {"dim": width, "dims": common.own_widths(model, width), "shared_codes": 256, "stages": 1}
  whole = common.small_index(model, size)
  return {
    "beam": whole | {"beam": 16},
    **{f"beam_{bits}_bits": common.small_index(model, size, bits) | {"beam": 16} for bits in (8, 6, 4)},
    "product": whole | product, "rotated": whole | product | {"rotation": "learned", "start": "opq"},
  }  # fmt: skip


def small(config, more_of):
  """Plain InfoNCE in each regularisation, and the best of them after a third of its steps more (`continued`).

  Beside them codes of each size, as they start from the best of them; where there is a stage `index`, on its rows.

  Args:
    config: whose `compare.bytes` has the sizes.
    more_of: further codes of each size: `trained`, those that start after as many steps; `published`, from scratch and
      as published, but for their number: one codebook for all positions; `ablations`, those that start
      in other forms.
  """
  plain, width, more = {"info_nce": 1.0}, config.model.shared_dim, max(1, config.steps // 3)
  of_ways = {"": {}} | {f"_{way}": settings for way, settings in REGULARISED.items()}
  variants = {
    f"info_nce{way}": variant(quantize=False, losses=plain, regularised={"mixup": 0.0} | settings)
    for way, settings in of_ways.items()
  }  # fmt: skip
  config.compare.bytes.baselines = tuple(variants)
  follow = {"follows": tuple(variants)}
  warm = follow | {"warm": True} | ({"stage_order": ("index",)} if "index" in config.stages else {})
  book = lambda options: {"codebook": ConfigDict(options)}
  variants["continued"] = variant(quantize=False, losses=plain, regularised=warm | {"steps": more})
  for size in config.compare.bytes.sizes:
    codes = common.small_index(config.model, size)
    searched = lambda length, options: variant(losses=common.SEARCHED, regularised=warm | length | book(options))
    variants[f"codes_{size}"] = searched(common.START, codes)
    for form, other in forms_of_codes(config.model, size).items() if "ablations" in more_of else ():
      variants[f"codes_{size}_{form}"] = searched(common.START, other)
    if "trained" in more_of:
      variants[f"trained_{size}"] = searched({"steps": more}, codes | {"ema": False, "gradient": "both"})
    if "published" in more_of:
      codes = {"dim": width // size, "dims": common.own_widths(config.model, width // size), "shared_codes": 256}
      variants[f"published_{size}"] = variant(losses=worlds.LOSSES, regularised=follow | book(codes))
  return variants


def get_config(arg=""):
  words = common.words_of(arg)
  sizes = tuple(int(word) for word in words if "bytes" in words and word in map(str, compare_worlds.SIZES))
  chosen = [word for word in words if "lineage" in words and word in worlds.STAGES]
  for word in words:
    if word not in (*WORLDS, *FORMS, *map(str, sizes), *chosen):
      allowed = (*WORLDS, *FORMS, *(map(str, compare_worlds.SIZES) if "bytes" in words else ()))
      allowed += tuple(worlds.STAGES) if "lineage" in words else ()
      raise ValueError(f"configs/compare.py:{arg}: unknown argument {word!r}; allowed: {', '.join(allowed)}")
  if "full" in words and ("generalise" not in words or "runlocal" in words):
    raise ValueError(f"configs/compare.py:{arg}: 'full' goes with generalise alone, and not with runlocal")
  if {"trained", "published", "lineage"} & set(words) and "bytes" not in words:
    raise ValueError(f"configs/compare.py:{arg}: 'trained', 'published' and 'lineage' go with bytes alone")
  if len(set(words) & set(WORLDS)) > 1 or len(set(words) & {*DRAWN, "ablations", "regularised"}) > 1:
    raise ValueError(f"configs/compare.py:{arg}: {', '.join(WORLDS)} exclude one another, as do 'equal', 'hard', "
                     "'unified', 'ablations' and 'regularised'")  # fmt: skip
  form = next((word for word in ("runlocal", "full") if word in words), "")
  if "bytes" in words:
    if "regularised" in words:
      raise ValueError(f"configs/compare.py:{arg}: 'bytes' goes with runlocal, lineage, trained, published, ablations "
                       "and sizes alone")  # fmt: skip
    config = compare_worlds.small(form, sizes, lineage=(chosen or list(worlds.STAGES)) if "lineage" in words else ())
    variants = small(config, {"trained", "published", "ablations"} & set(words))
  elif drawn := DRAWN.keys() & set(words):
    config, variants = DRAWN[drawn.pop()](form)
  elif set(words) & set(WORLDS):
    config = (compare_worlds.real if "real" in words else compare_worlds.generalise)(form)
    sizes = (32, 32, 128) if form == "runlocal" else (256, 256, 1024)
    variants = methods(("text",), "text", worlds.LOSSES, *sizes)
    # By the validation sets of `real` (docs/methods.md has the numbers).
    variants["dcid"].options.reset_by, variants["fcid"].options.reset_by = "source", "all"
  else:
    config, variants = graded(form)
  if "ablations" in words and "bytes" not in words:
    variants = without_parts(variants["dcid"], variants["codebind"])
  elif "regularised" in words:
    variants = regularised(variants)
  elif form != "runlocal" and not {*DRAWN, "bytes"} & set(words):
    variants |= regularised(variants)
  before = "comparisons with fewer sizes, rates and seeds" if "bytes" in words else (
    "comparisons with fewer rates, seeds and variants"
  )
  config.compare.read_before = before * (form != "runlocal")
  config.compare.variants = ConfigDict(variants)
  return config.lock()
