"""All losses of a DCID and an FCID step together, from recorded encoder outputs to the recorded total."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import losses
from codebind_jax.codebook import unified
from codebind_jax.models.critics import ConditionalGaussian, FuturePredictor
from codebind_jax.models.levels import CoarseLevel, TokenDecoder
from tests.golden_fixtures import close, dense, gaussian, load, predictor
from tests.test_unified import check_state, release_commitment, release_matching, release_state


@pytest.fixture(autouse=True, scope="module")
def double():
  jax.config.update("jax_disable_most_optimizations", True)
  with jax.enable_x64(True):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


def club(data, name, x, y, permutation, **options):
  net = ConditionalGaussian(y.shape[-1], 20)
  q = net.apply({"params": gaussian(data, f"club_after/{name}")}, x)
  return losses.club_estimate(*q, y, permutation, **options)


def test_dcid():
  data = load("cmg_dcid")
  names = ("audio", "video", "text")
  z = {m: data[f"out/{m}_semantic_result"] for m in names}
  own = {"audio": data["out/audio_encoder_result"], "text": data["out/text_encoder_result"],
         "video": data["out/video_club_feature"]}  # fmt: skip
  state = release_state(data, "quantizer/init", ("audio", "video", "text"))
  quantized = unified.quantize_unified(z, state.codes)
  for m in names:
    assert np.array_equal(np.ravel(quantized[m].indices), data[f"out/indices_{m}"])
    close(quantized[m].vectors, data[f"out/{m}_vq"], 1e-9)
  commit = release_commitment(z, {m: q.codes for m, q in quantized.items()}, 3)
  for m in names:
    close(commit[m], data[f"out/{m}_embedding_loss"], 1e-9)
  matching = release_matching(z, state.codes)
  close(matching, data["out/cmcm_loss"], 1e-9)
  new = unified.update_unified(
    state, z, {m: q.indices for m, q in quantized.items()}, form="sequential", order=names
  )
  check_state(new, data, "quantizer/after")

  # CLUB on what is quantised, as the release; the estimate is a small difference of large numbers.
  mi = {m: club(data, m, quantized[m].vectors, own[m], data[f"perm/{m}"]) for m in names}
  for m in names:
    assert float(mi[m]) == pytest.approx(float(data[f"loss/mi_{m}"]), abs=1e-8)
  ahead = {}
  for m in names:
    net = FuturePredictor(32, 1, 2)
    ahead[m] = net.apply({"params": predictor(data, "w/cpc", m)}, z[m])
  coding = losses.cross_cpc(ahead, z, int(data["cpc_t"]), self_weight=0.1, over="predictions")
  close(coding, data["loss/cpc"], 1e-9)
  total = sum(commit.values()) + matching + sum(mi.values()) + coding
  total += sum(data[f"loss/{m}_recon"] for m in names)
  close(total, data["loss/total"], 1e-9)


def coarse_parameters(data):
  sides = {"av": "va", "text": "t"}
  params = {}
  for ours, theirs in sides.items():
    params[f"{ours}_compress"] = dense(data, f"w/encoder/{theirs}2vat.linear")
    params[f"{ours}_general"] = dense(data, f"w/encoder/{theirs}_gen_encoder.input_linear")
    params[f"{ours}_specific"] = dense(data, f"w/encoder/{theirs}_spe_encoder.input_linear")
  return {"params": params}


LEVEL = CoarseLevel({"video": "av", "audio": "av", "text": "text"}, 32)


def test_fcid():
  data = load("cmg_fcid")
  letters = {"video": "v", "audio": "a", "text": "t"}
  fine = {"video": data["out/v_gen_result"], "audio": data["out/a_gen_result"]}
  coarse = LEVEL.apply(coarse_parameters(data), fine)
  for m in fine:
    close(coarse[m].compressed[:, 0], data[f"out/coarse_{letters[m]}_result"], 1e-9)
    close(coarse[m].general[:, 0], data[f"out/coarse_{letters[m]}_gen_result"], 1e-9)
    close(coarse[m].specific[:, 0], data[f"out/coarse_{letters[m]}_spe_result"], 1e-9)
  # Of the text, the fixture has the compressed feature only.
  text = {part: data[f"out/coarse_t_{part}result"][:, None] for part in ("", "gen_", "spe_")}
  general = {m: coarse[m].general for m in fine} | {"text": text["gen_"]}

  state = release_state(data, "quantizer/init", ("audio", "video", "text"))
  quantized = unified.quantize_unified(general, state.codes)
  for m, letter in letters.items():
    assert np.array_equal(np.ravel(quantized[m].indices), data[f"out/indices_{letter}"])
    close(quantized[m].vectors, data[f"out/c_{letter}_vq"], 1e-9)
  commit = sum(release_commitment(general, {m: q.codes for m, q in quantized.items()}, 3).values())
  close(commit, data["out/c_embedding_loss"], 1e-9)
  matching = release_matching(general, state.codes)
  close(matching, data["out/c_cmcm_loss"], 1e-9)
  indices = {m: q.indices for m, q in quantized.items()}
  new = unified.update_unified(state, general, indices, form="sequential", order=tuple(letters))
  check_state(new, data, "quantizer/after")

  decoded = 0.0
  for m, letter in letters.items():
    net = TokenDecoder(32, 32)
    params = {"code": dense(data, f"w/decoder/{letter}_coarse_decoder.simple_linear"),
              "token": dense(data, f"w/decoder/{letter}_coarse_decoder.simple_rec")}  # fmt: skip
    u, own = (coarse[m].compressed, coarse[m].specific) if m in coarse else (text[""], text["spe_"])
    decoded += jnp.mean((net.apply({"params": params}, quantized[m].vectors, own) - u) ** 2)
  close(decoded, data["loss/coarse_recon"], 1e-9)

  mi = {
    "video": club(data, "video", fine["video"], data["out/v_club_feature"], data["perm/video"]),
    "audio": club(data, "audio", fine["audio"], data["out/a_spe_result"], data["perm/audio"]),
  }
  flat = functools.partial(club, data, release_axis=True)
  stacked = (jnp.concatenate([getattr(coarse[m], part)[:, 0] for m in fine]) for part in ("general", "specific"))
  mi["audiovisual"] = flat("audiovisual", *stacked, data["perm/audiovisual"])
  mi["text"] = flat("text", text["gen_"][:, 0], text["spe_"][:, 0], data["perm/text"])
  for name, value in mi.items():
    assert float(value) == pytest.approx(float(data[f"loss/mi_{name}"]), abs=1e-8)

  ahead = {m: FuturePredictor(32, 1, 2).apply({"params": predictor(data, "w/cpc", m)}, x) for m, x in fine.items()}
  coding = losses.cross_cpc(ahead, fine, int(data["cpc_t"]), self_weight=0.1, over="predictions")
  close(coding, data["loss/cpc"], 1e-9)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  contrast = sum(
    losses.directed_info_nce(unit(general[m][:, 0]), unit(general["text"][:, 0]), temperature=0.1) for m in fine
  )
  close(contrast, data["loss/infonce"], 1e-9)
  total = commit + matching + decoded + sum(mi.values()) + coding + contrast + data["loss/fine_recon"]
  close(np.reshape(total, 1), data["loss/total"], 1e-6)


def test_fcid_inference_compresses_every_frame_by_itself():
  data = load("cmg_fcid")
  fine = {"video": data["out/v_gen_result"], "audio": data["out/a_gen_result"]}
  coarse = LEVEL.apply(coarse_parameters(data), fine, per_step=True)
  # The release's inference runs after the update of the codebook.
  codes = data["quantizer/after/embedding"]
  for m in fine:
    got = unified.quantize_unified({m: coarse[m].general}, codes)[m]
    assert np.array_equal(np.ravel(got.indices), data[f"infer/{m.title()}_C_split_indices"])
    close(got.codes, data[f"infer/{m.title()}_VQ_Encoder_C_split"], 1e-9)


def test_modalities_of_a_group_share_their_maps():
  x = np.random.default_rng(0).normal(size=(2, 3, 5))
  level = CoarseLevel({"a": "av", "v": "av", "t": "text"}, 4)
  tokens = {"a": x, "v": x, "t": x}
  params = level.init(jax.random.key(0), tokens)
  out = level.apply(params, tokens)
  close(out["a"].general, out["v"].general, 1e-12)
  assert np.any(out["a"].compressed != out["t"].compressed) and out["a"].compressed.shape == (2, 1, 4)
  assert len(params["params"]) == 6
