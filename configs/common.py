"""Defaults every config starts from. Each key can be set on the command line: --config.KEY=VALUE."""

from ml_collections import ConfigDict


def tower(trunk, **overrides):
  """One modality: its frozen trunk and its heads."""
  config = ConfigDict()
  config.trunk = trunk
  config.options = ConfigDict()  # passed to the trunk's loader
  config.views = 1  # cached views of a training item: the clean one and views-1 augmented ones
  config.augmented = 0.5  # how often an augmented view is drawn
  config.specific_dim = 0
  config.hidden = 0
  config.dropout = 0.0
  config.init = "orthogonal"
  config.whiten = 0.0  # the shared head starts with the training tokens' covariance to this negative power in it
  config.logit_scale = 1.0
  config.body = ""  # a module of models/bodies.py that trains between the trunk's tokens and the heads
  config.body_options = ConfigDict()
  config.starts_from = ""  # a modality whose heads this one's are copied from when its first stage begins
  config.meaning = ""  # a modality in whose trunk's space the last `meaning_dim` columns of the tokens lie
  config.meaning_dim = 0
  config.update(overrides)
  return config


def stage(config, **overrides):
  """One stage; steps and batch size follow the top-level ones unless set."""
  entry = ConfigDict()
  for key in ("steps", "batch_size"):  # a value given here must not reach the top-level key through its reference
    if key not in overrides:
      entry[key] = config.get_ref(key)
  entry.pairs = (("image", "text"),)
  entry.sources = ConfigDict()  # source -> rows of a batch; empty: the only source, with the stage's batch_size
  entry.weights = ConfigDict()  # source -> weight of its losses; 1 unless set
  entry.unique_labels = True  # at most one row of a label in a batch
  entry.learning_rate = 0.0  # 0: config.optim's
  entry.train = (".*",)
  entry.codes = (".*",)  # the codebooks that learn: shared, and each modality's own under its name
  entry.temperature = 0.07
  entry.matching_temperature = 1.0
  entry.code_rows = 0  # rows of a batch for code_contrast and code_matching; 0 for all
  entry.chunk = 0  # rows and columns of the InfoNCE logits held at once; 0 for all. Several devices pass them on
  entry.ring = False  # they do with chunk = 0 as well: rows go from device to device instead of being gathered
  entry.parts = 1  # the towers see the batch in so many parts, for batches larger than memory; the rest sees it whole
  entry.mixup = 0.0  # share of another row mixed into every row: Beta(mixup, mixup); 0 for none
  entry.balance = False  # weights follow the magnitude of info_nce; `losses` then only says which terms take part
  entry.losses = ConfigDict()
  entry.update(overrides)
  return entry


def get_config():
  """Everything but towers and stages."""
  config = ConfigDict()
  config.mode = "train"
  config.topology = ""  # mode compile: the TPU slice to compile for, such as v5e:16x16
  config.method = "codebind"  # a module of codebind_jax/methods
  config.method_options = ConfigDict()  # its fields
  config.seed = 0
  config.steps = 500
  config.batch_size = 256
  config.log_steps = 20
  config.eval_steps = 250  # validation sets only; the end of the run is always evaluated
  config.checkpoint_steps = 100
  config.keep_checkpoints = 2
  config.init_from = ""  # workdir of a finished run whose modalities this one starts with
  config.baseline = True  # train the same heads by plain InfoNCE, without codebooks, and report both
  config.test = True  # read the test sets once, at the end
  config.tasks = ("zeroshot", "retrieval", "probe", "codes")  # what the last evaluation measures; probes take longest
  config.emergent = ()  # pairs of modalities that no stage binds, to be retrieved from each other by concept
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  config.sharding = ConfigDict()
  config.sharding.rules = ()  # ((path regex, names of the last axes), ...) before those of sharding.py
  config.sharding.codes = ""  # a mesh axis to split codebooks over; "" keeps them whole

  config.data = ConfigDict()
  config.data.root = ""  # default: $CODEBIND_DATA, else the user's cache folder
  config.data.worlds = ("icons",)
  config.data.profile = "auto"
  config.data.manifest = ""  # a JSONL manifest of your own instead of the world
  config.data.classes = ""  # a text file with one class name a line; default: the labels that occur
  config.data.max_bad_records = 0
  config.data.extra = 0.0  # share of a batch drawn from a world's further named pictures; 0 leaves them out
  config.data.workers = 0  # processes that read batches ahead; 0: threads of this one
  config.data.threads = 2  # that read batches ahead without workers
  config.data.captions = "each"  # a row's further texts: main (left out), each (captions) or joined (one list)
  config.data.templates = ("{}",)
  config.data.templates_of = ConfigDict()  # source -> templates of its captions and classes, where others suit it
  config.data.eval_templates = ("{}",)

  config.model = ConfigDict()
  config.model.shared_dim = 384
  config.model.quantize = True
  config.model.half = ()  # path regexes of parameters kept in bfloat16 (frozen trunks)
  config.model.towers = ConfigDict()
  config.model.decoder = ConfigDict({"width": 128, "depth": 1, "heads": 4})  # made if a stage has `reconstruction`

  config.codebook = ConfigDict()
  config.codebook.dim = 8
  config.codebook.shared_codes = 1024
  config.codebook.codes = ConfigDict()
  config.codebook.distance = "cosine"
  config.codebook.normalize = True  # quantise directions of segments only
  config.codebook.layout = "parts"
  config.codebook.update_mode = "snapshot"  # "sequential" updates after each modality, as the release does
  config.codebook.decay = 0.99
  config.codebook.revive = "random"
  config.codebook.revive_mode = "survive"
  config.codebook.detach_similarity = False
  config.codebook.alarm_share = 0.1  # warn when a codebook's perplexity falls under this share of its size

  config.optim = ConfigDict()
  config.optim.learning_rate = 1e-3
  config.optim.warmup = 50
  config.optim.final_ratio = 0.02
  config.optim.b1 = 0.9
  config.optim.b2 = 0.95
  config.optim.weight_decay = 1e-4
  config.optim.clip_norm = 1.0
  config.optim.accumulate = 1  # more is refused: see stages.*.parts
  # (path regex, learning-rate multiplier, weight-decay multiplier); the first match wins
  config.optim.rules = ((r".*_log_logit_scale", 1.0, 0.0), (r".*(bias|scale)", 1.0, 0.0), (r".*kernel", 1.0, 1.0),
                        (r"method/codes", 1.0, 0.0), (r".*/decoder/positions", 1.0, 0.0))  # fmt: skip

  config.stages = ConfigDict()
  config.stage_order = ()
  return config
