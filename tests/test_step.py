"""The training step: mixup, alignment before the quantiser, reconstruction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from codebind_jax import config as config_lib
from codebind_jax import schema
from codebind_jax.compositional import new_codebooks
from codebind_jax.models.decoder import Decoder
from codebind_jax.runtime.optim import make_optimizer, param_paths
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.step import make_embed_step, make_train_step, mixed, mixup_shares
from configs import stage1, synthetic

ROWS = slice(0, 6)


def tokens_of(*masks):
  rng = np.random.default_rng(0)
  tokens = {name: jnp.asarray(rng.normal(size=(6, t, 3)), jnp.float16) for name, t in (("image", 2), ("text", 1))}
  return tokens, {name: jnp.asarray(mask, bool) for name, mask in zip(tokens, masks)}


def all_mixed(rng, tokens, masks, owners, alpha):
  """The tokens mixed as the step does; a modality without rows of a source stays."""
  shares = mixup_shares(rng, masks, owners, alpha)
  return {name: mixed(x, shares[name], owners, name) for name, x in tokens.items()}


def test_mixup_takes_one_share_for_all_modalities_of_a_row():
  tokens, masks = tokens_of([1] * 6, [1] * 6)
  out = all_mixed(jax.random.key(0), tokens, masks, {("a", "image"): ROWS, ("a", "text"): ROWS}, 1.0)
  shares = {}
  for name, x in tokens.items():
    own, other = np.asarray(x, np.float64), np.roll(np.asarray(x, np.float64), 1, axis=0)
    share = (np.asarray(out[name]) - other) / (own - other)
    np.testing.assert_allclose(share, share[:, :1, :1] + 0 * share, rtol=1e-3)
    shares[name] = share[:, 0, 0]
  np.testing.assert_allclose(shares["image"], shares["text"], rtol=1e-3)
  assert (shares["text"] >= 0.5).all() and (shares["text"] <= 1.0).all() and np.ptp(shares["text"]) > 0.1


def test_mixup_leaves_rows_whose_neighbour_lacks_a_modality():
  tokens, masks = tokens_of([1, 1, 0, 1, 1, 1], [1] * 6)
  out = all_mixed(jax.random.key(1), tokens, masks, {("a", "image"): ROWS, ("a", "text"): ROWS}, 1.0)
  for name, x in tokens.items():
    np.testing.assert_array_equal(out[name][3], x[3].astype(jnp.float32), err_msg="its neighbour has no image")
    assert (out[name][4] != x[4]).any()
  assert (out["text"][2] != tokens["text"][2]).any(), "a row without an image mixes its text"


def test_mixup_stays_within_a_source():
  tokens, masks = tokens_of([1] * 6, [1] * 6)
  owners = {("a", "image"): slice(0, 2), ("b", "image"): slice(2, 6)}
  changed = tokens["image"].at[:2].add(5.0)
  first, second = (
    all_mixed(jax.random.key(0), tokens | {"image": image}, masks, owners, 1.0) for image in (tokens["image"], changed)
  )
  np.testing.assert_array_equal(first["image"][2:], second["image"][2:])
  np.testing.assert_array_equal(first["text"], tokens["text"])


def test_sources_are_mixed_by_shares_of_their_own():
  tokens, masks = tokens_of([1] * 6, [1] * 6)
  twice = tokens | {"image": jnp.concatenate([tokens["image"][:3]] * 2)}
  owners = {("a", "image"): slice(0, 3), ("b", "image"): slice(3, 6)}
  out = all_mixed(jax.random.key(0), twice, masks, owners, 1.0)["image"]
  assert np.abs(out[:3] - out[3:]).max() > 0.1


def test_info_nce_before_the_quantiser_is_that_of_a_model_without_one():
  config = stage1.get_config().unlock()
  config.update_from_flattened_dict({
    "model.shared_dim": 8, "codebook.shared_codes": 4, "codebook.codes.image": 4, "steps": 2, "batch_size": 6,
    "model.towers.image.specific_dim": 8, "model.towers.image.meaning": "", "stages.bridges.mixup": 0.0,
  })
  rng = np.random.default_rng(0)
  batch = {name: jnp.asarray(rng.normal(size=(6, 1, 12)), jnp.float32) for name in ("image", "text")}
  params = config_lib.method_of(config_lib.read(config)).model.init(jax.random.key(0), batch)["params"]
  batch["_mask"] = {name: jnp.ones(6, bool) for name in ("image", "text")}
  found = {}
  for quantize in (True, False):
    config.model.quantize = quantize
    config.stages.bridges.losses = {"info_nce": 1.0, "info_nce_plain": 0.5}
    run = config_lib.read(config)
    method, stage = config_lib.method_of(run), run.ordered[0]
    books = new_codebooks(jax.random.key(1), method.spec, run.model.towers) if quantize else {}
    tx, _ = make_optimizer(params, stage.train, run.optim, 2)
    state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), {}, jax.random.key(2))
    _, found[quantize] = jax.jit(make_train_step(method, stage, tx))(state, {"rows": batch})
  quantised, plain = found[True], found[False]
  np.testing.assert_allclose(quantised["train/info_nce_plain"], plain["train/info_nce"], rtol=1e-5)
  np.testing.assert_allclose(plain["train/total"], 1.5 * plain["train/info_nce"], rtol=1e-5)
  assert abs(quantised["train/info_nce"] - quantised["train/info_nce_plain"]) > 1e-3


def test_codebooks_that_a_stage_does_not_name_stay_as_they_are():
  config, method, params, batch = reconstructing({"info_nce": 1.0, "commitment": 1.0})
  stage = dataclasses.replace(config.ordered[0], codes=("image", "dep.*"))
  books = new_codebooks(jax.random.key(1), method.spec, config.model.towers)
  tx, _ = make_optimizer(params, stage.train, config.optim, 2)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), {}, jax.random.key(2))
  after, _ = jax.jit(make_train_step(method, stage, tx))(state, {"rows": batch})
  moved = {name: bool((book.ema_count != books[name].ema_count).any()) for name, book in after.codebooks.items()}
  assert moved == {"shared": False, "image": True, "depth": True}
  jax.tree.map(np.testing.assert_array_equal, after.codebooks["shared"], books["shared"])


def reconstructing(losses, meaning=0):
  """A method of three towers on 12 values an item; the last `meaning` ones of an image lie in text space."""
  config = synthetic.get_config("runlocal").unlock()
  for name in set(config.model.towers) - {"image", "depth", "text"}:
    del config.model.towers[name]
    del config.codebook.codes[name]
  for name in ("image", "depth"):
    config.model.towers[name].update({"specific_dim": 8})
    if "width" in config.model.towers[name].options and name != "text":
      config.model.towers[name].options.width = 8
    config.codebook.codes[name] = 4
  if meaning:
    config.model.towers.image.update({"meaning": "text", "meaning_dim": meaning, "trunk": "vectors", "cache": True})
    config.model.towers.text.update({"trunk": "vectors", "cache": True})
    for name in ("image", "text"):
      config.model.towers[name].options = ConfigDict({"modality": name})
  config.update_from_flattened_dict({
    "model.shared_dim": 8, "codebook.shared_codes": 4, "model.decoder.width": 8, "model.decoder.heads": 2,
    "steps": 2, "batch_size": 6, "stages.bridges.pairs": (("image", "text"),), "stages.bridges.losses": losses,
  })
  config.stage_order = ("bridges",)
  config = config_lib.read(config)
  method = config_lib.method_of(config)
  rng = np.random.default_rng(0)
  widths = dict.fromkeys(config.model.towers, 12) | ({"text": meaning} if meaning else {})
  batch = {name: jnp.asarray(3 * rng.normal(size=(6, 1, n)) + 1, jnp.float32) for name, n in widths.items()}
  params = method.model.init(jax.random.key(0), batch)["params"]
  batch["_mask"] = {name: jnp.ones(6, bool) for name in config.model.towers}
  batch["_mask"]["depth"] = jnp.asarray([1, 1, 0, 1, 0, 0], bool)
  batch["_group"] = jnp.arange(6)
  return config, method, params, batch


def test_decoders_exist_where_a_stage_reconstructs_and_only_there():
  without, having = (
    reconstructing({"info_nce": 1.0, "reconstruction": weight})[2] for weight in (0.0, 0.5)
  )  # fmt: skip
  assert all("decoder" not in without[name] for name in ("image", "depth", "text"))
  assert {name for name in ("image", "depth", "text") if "decoder" in having[name]} == {"image", "depth"}
  paths = param_paths(having["depth"]["decoder"])
  assert paths["deconv/kernel"].shape == (1, 8, 12) and paths["positions"].shape == (1, 16)


@pytest.mark.parametrize("meaning", [0, 5])
def test_reconstruction_is_the_error_of_standardised_tokens_and_reaches_every_part(meaning):
  config, method, params, batch = reconstructing({"reconstruction": 2.0}, meaning)
  stage = config.ordered[0]
  books = new_codebooks(jax.random.key(1), method.spec, config.model.towers)
  tx, _ = make_optimizer(params, stage.train, dataclasses.replace(config.optim, warmup=0, weight_decay=0.0), 2)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), {}, jax.random.key(2))
  after, metrics = jax.jit(make_train_step(method, stage, tx))(state, {"rows": batch})

  tokens = {name: batch[name] for name in config.model.towers}
  outputs = jax.jit(make_embed_step(method))(params, books, tokens)
  assert all(out.similarity_shared.shape[0] == 0 for out in outputs.values())  # of no use here, and most of the work
  expected = 0.0
  for name in ("image", "depth"):
    x, rows = np.asarray(tokens[name], np.float64), np.asarray(batch["_mask"][name])
    x = x[..., : 12 - meaning] if name == "image" else x
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    found = Decoder((1,), x.shape[-1], (1,), cls_token=False, **schema.to_plain(config.model.decoder)).apply(
      {"params": params[name]["decoder"]}, outputs[name].full
    )
    expected += np.mean((np.asarray(found) - x)[rows] ** 2)
  np.testing.assert_allclose(metrics["train/reconstruction"], expected, rtol=1e-4)
  np.testing.assert_allclose(metrics["train/total"], 2 * metrics["train/reconstruction"], rtol=1e-6)
  moved = {path: bool((old != new).any()) for (path, old), new in zip(
    param_paths(params).items(), jax.tree.leaves(after.params))}
  for part in (*["trunk/first"] * (not meaning), "shared/proj", "specific/proj", "decoder/deconv", "decoder/embed"):
    assert moved[f"image/{part}/kernel"] and moved[f"depth/{part}/kernel"], part
  assert moved["text/shared/proj/kernel"] == bool(meaning)  # which maps those columns
