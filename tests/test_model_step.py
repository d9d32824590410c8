"""One whole loss evaluation of the CodeBind release: quantiser, every loss, decoders, gradients, codebook updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import losses
from codebind_jax.codebook import CodebookState
from codebind_jax.compositional import CompositionalSpec, quantize_modalities, split_parts, split_segments
from codebind_jax.losses.reconstruction import reconstruction
from codebind_jax.models.decoder import decoder_for
from codebind_jax.norm import unit
from codebind_jax.trunks import codebind_release, names
from tests.model_fixtures import CLIPS, SHARED, encoded, error, golden, inputs, jit, official, spec, state_dict, weights

STEP = golden("codebind_model_tiny_step")
ORDER = ("text", "image", "audio")
PAIRS = (("image", "text"), ("text", "audio"), ("image", "audio"))
BOOKS = {"shared": "common", "image": "vision", "audio": "audio"}
FIELDS = {"codes": "weight", "ema_count": "cluster_size", "ema_sum": "embed_avg"}
SPEC = CompositionalSpec(SHARED, 24, (("text", 0),), revive="none", detach_similarity=True)


def books_before():
  states = {}
  for ours, theirs in BOOKS.items():
    arrays = {field: jnp.asarray(STEP[f"step/vq_init/{theirs}/{name}"]) for field, name in FIELDS.items()}
    states[ours] = CodebookState(**arrays, usage=jnp.zeros(len(arrays["codes"])), initialised=jnp.ones((), bool))
  return states


def decode_loss(modality):
  """Loss of the quantised tokens of one modality under the release's decoder."""
  decoder, out = decoder_for(spec(modality), width=16, depth=2), encoded(modality)
  clips = CLIPS.get(modality, 1)
  fixed = out.trunk.reshape(-1, clips, *out.trunk.shape[1:]).mean(1), out.positions
  tokens = jnp.asarray(STEP[f"step/in/{official(modality)}"])
  tree = jax.eval_shape(decoder.init, jax.random.key(0), tokens, *map(jnp.asarray, fixed))["params"]
  part = codebind_release.decoder_weights(weights(state_dict("dec/w/")), modality)
  params = names.load(tree, part, codebind_release.decoder_rules(modality))

  def loss(tokens, x, trunk, positions):
    return reconstruction(decoder.apply({"params": params}, tokens, trunk, positions), x, clips=clips)

  return functools.partial(loss, x=jnp.asarray(inputs(modality)), trunk=jnp.asarray(fixed[0]),
                           positions=jnp.asarray(fixed[1]))


def evaluate(tokens, decode):
  books, outputs, terms = books_before(), {}, {"vq": 0.0, "vq_contra": 0.0, "vq_uni": 0.0}
  for m in ORDER:
    before = books
    out, books = quantize_modalities({m: tokens[m]}, books, SPEC, update="sequential")
    outputs[m] = out[m]
    terms["vq"] += out[m].commitment
    for part, name in zip(split_parts(tokens[m], SHARED, tokens[m].shape[-1] - SHARED), ("shared", m)):
      if part.shape[-1]:
        similarity = unit(split_segments(part, 8)).reshape(-1, 8) @ unit(before[name].codes).T
        terms["vq_contra"] += losses.code_contrast(jax.lax.stop_gradient(similarity), double_softmax=True)
        terms["vq_uni"] += losses.code_uniform(before[name].codes)
  shared = {m: out.shared.reshape(out.shared.shape[0], -1, SHARED)[:, 0] for m, out in outputs.items()}
  pairs = lambda loss: sum(loss(a, b) for a, b in PAIRS) / len(PAIRS)
  terms["cross"] = pairs(lambda a, b: losses.info_nce(shared[a], shared[b], temperature=0.05))
  similarity = {m: out.similarity_shared for m, out in outputs.items()}
  terms["cmcm"] = pairs(lambda a, b: losses.code_matching(similarity[a], similarity[b]))
  terms["modal_decomp"] = sum(losses.decomposition(outputs[m].shared, outputs[m].specific) for m in decode) / 2
  terms["uniform"] = sum(losses.specific_uniform(outputs[m].specific[:, 0]) for m in decode) / 2
  for m, loss in decode.items():
    terms[f"piexl_recons_{official(m)}"] = loss(outputs[m].full)
  weights = {"vq": 50, "vq_contra": 0.01, "vq_uni": 0.01, "modal_decomp": 0.1}
  total = sum(weights.get(name, 1.0) * value for name, value in terms.items())
  return total, (terms, books, {m: out.full for m, out in outputs.items()})


@pytest.fixture(scope="module")
def step():
  decode = {m: decode_loss(m) for m in ("image", "audio")}
  tokens = {m: jnp.asarray(STEP[f"step/in/{official(m)}"]) for m in ORDER}
  return jax.device_get(jit(jax.value_and_grad(functools.partial(evaluate, decode=decode), has_aux=True))(tokens))


def test_every_term_and_the_total(step):
  (total, (terms, _, _)), _ = step
  assert len(terms) == sum(key.startswith("step/log/") for key in STEP)
  for name, value in terms.items():
    np.testing.assert_allclose(value, STEP[f"step/log/train_loss_{name}"], rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(total, STEP["step/total"], rtol=1e-5)


def test_gradients_of_the_tokens(step):
  _, gradients = step
  assert error(gradients["text"], STEP["step/grad/text"]) < 1e-4
  for m in ("image", "audio"):
    assert error(gradients[m][:, ::4], STEP[f"step/grad/{official(m)}_all_tokens"]) < 1e-4


def test_quantised_tokens_and_codebooks_afterwards(step):
  (_, (_, books, full)), _ = step
  for m in ORDER:
    assert error(full[m], STEP[f"step/{official(m)}_vq"]) < 1e-5
  for ours, theirs in BOOKS.items():
    for field, name in (*FIELDS.items(), ("usage", "embed_prob")):
      assert error(getattr(books[ours], field), STEP[f"step/vq_after/{theirs}/{name}"]) < 1e-5
