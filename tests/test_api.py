"""The public names: where they are, their arguments and defaults, and what they take and give in short."""

import importlib
import inspect

import jax
import numpy as np
import pytest

import codebind_jax
from codebind_jax import codebook, compositional, losses, transport
from codebind_jax.data import open_source, transforms
from codebind_jax.methods import toc

SIGNATURES = {
  "codebook.init_codebook": "(rng, num_codes, dim, lead=())",
  "codebook.nearest_code": "(z, codes, *, distance='cosine', block=0)",
  "codebook.quantize": "(z, codes, *, distance='cosine', normalize=True)",
  "codebook.update": "(state, z, indices, *, decay=0.99, eps=1e-05, revive='random', revive_mode='survive', rng=None, "
                     "weights=None",
  "codebook.kmeans": "(rng, z, num_codes, *, iterations=10, distance='cosine', init=None",
  "codebook.usage_stats": "(counts)",
  "compositional.split_segments": "(x, dim)",
  "compositional.merge_segments": "(x)",
  "compositional.split_parts": "(x, shared_dim, specific_dim, *, layout='parts', code_dims=(8, 8))",
  "compositional.quantize_modalities": "(features, codebooks, spec, *, update='snapshot', rng=None",
  "losses.info_nce": "(a, b, *, temperature, logit_scale_a=1.0, logit_scale_b=1.0, mask=None, chunk=0",
  "losses.commitment": "(z, q, *, beta=0.25",
  "losses.code_contrast": "(similarity, *, double_softmax=False",
  "losses.code_uniform": "(codes",
  "losses.code_matching": "(sim_a, sim_b",
  "losses.decomposition": "(shared, specific",
  "losses.specific_uniform": "(s",
  "losses.centroid_info_nce": "(anchors, features, *, temperature, weights=None, mask=None",
  "losses.fixed_anchor_info_nce": "(anchors, features, *, temperature",
  "losses.club_estimate": "(mu, logvar, y, permutation",
  "losses.club_likelihood": "(mu, logvar, y",
  "losses.cpc": "(",
  "losses.balance_init": "(names",
  "losses.balance_update": "(state, raw_losses)",
  "transport.ipot": "(cost, a=None, b=None, *, beta=0.5, outer=50, inner=1",
  "transport.sinkhorn": "(cost, a=None, b=None, *, reg, iterations",
  "methods.toc.channel_scores": "(codes",
  "methods.toc.select_channels": "(codes, q, ratio=(1, 0)",
  "api.load": "(",
  "evaluate.evaluate": "(config, workdir)",
  "trunks.load_trunk": "(name, *, weights='', **options)",
  "data.open_source": "(files",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_keep_their_arguments(name):
  module, _, function = name.rpartition(".")
  found = inspect.signature(getattr(importlib.import_module(f"codebind_jax.{module}"), function))
  plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
  text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
  assert text.startswith(SIGNATURES[name]), text


def test_a_codebook_state_has_its_fields_and_starts_as_documented():
  state = codebook.init_codebook(jax.random.key(0), 6, 4)
  assert isinstance(state, codebook.CodebookState)
  assert [f for f in state.__dataclass_fields__] == ["codes", "ema_count", "ema_sum", "usage", "initialised"]
  np.testing.assert_allclose(np.linalg.norm(state.codes, axis=1), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(state.ema_sum, state.codes)
  assert not state.ema_count.any() and not state.usage.any() and not bool(state.initialised)


def test_search_quantisation_and_usage_do_what_they_say():
  codes = np.eye(3, 2, dtype=np.float32) + np.array([[0, 0], [0, 0], [1, 0]], np.float32)
  z = np.array([[2.0, 0.1], [0.1, 3.0], [np.nan, 0.0]], np.float32)
  np.testing.assert_array_equal(codebook.nearest_code(z, codes), [0, 1, 0])
  vectors, indices = codebook.quantize(z[:2], codes)
  np.testing.assert_array_equal(indices, [0, 1])
  np.testing.assert_allclose(vectors, codes[:2], atol=1e-6)
  stats = codebook.usage_stats(np.array([3.0, 0.0, 1.0]))
  assert set(stats) == {"active_share", "perplexity", "dead", "max_share"}
  assert float(stats["dead"]) == 1 and float(stats["max_share"]) == pytest.approx(0.75)
  x = np.arange(12.0).reshape(2, 6)
  np.testing.assert_array_equal(compositional.merge_segments(compositional.split_segments(x, 2)), x)


def test_public_losses_are_scalars_and_plans_have_their_marginals():
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=(5, 4)).astype(np.float32) for _ in range(2))
  for value in (
    losses.info_nce(a, b, temperature=0.1), losses.commitment(a, b), losses.code_contrast(a), losses.code_uniform(a),
    losses.code_matching(a[:, None], b[:, None]), losses.decomposition(a[:, None], b[:, None]),
    losses.specific_uniform(a), losses.centroid_info_nce({"a": a, "b": b}, {"a": a, "b": b}, temperature=0.1),
  ):  # fmt: skip
    assert value.shape == () and np.isfinite(value)
  np.testing.assert_allclose(transport.ipot(rng.random((4, 6)).astype(np.float32)).sum(1), np.full(4, 0.25), atol=1e-3)
  assert toc.select_channels(a, 2).shape == (2,)


def test_lazy_names_and_transforms():
  assert callable(codebind_jax.load) and codebind_jax.search.Index and callable(open_source)
  assert {"add", "search", "save", "load", "from_parquet"} <= set(dir(codebind_jax.search.Index))
  for modality in ("image", "video", "audio", "depth", "thermal", "tactile", "points", "eeg"):
    assert callable(transforms.of(modality).read), modality
