"""The quantiser, its state and k-means against numbers recorded from the public PyTorch release."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import codebook, compositional, losses
from codebind_jax.codebook.revival import draw_candidates
from tests.arrays import compiled

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = sorted(path.stem.removeprefix("codebind_mvq_") for path in GOLDEN.glob("codebind_mvq_*.npz"))
STATE = {"codes": "weight", "ema_count": "cluster_size", "ema_sum": "embed_avg", "usage": "embed_prob"}
ANCHORS = {"none": "none", "closest": "closest", "random": "random"}


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
  """Compile time is what these tests cost."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def close(got, want, tolerance=2e-5):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  if want.size:
    assert got.shape == want.shape
    error = np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30)
    assert error < tolerance, error
  else:
    assert not got.size


def name_of(book):
  return "shared" if book == "common" else book


def spec_of(config, modalities):
  others = [m for m in modalities if m != "text"]
  widths, dims = config["input_vector_dim"], config["codevector_dim"]
  return compositional.CompositionalSpec(
    shared_dim=widths["common"],
    specific_dims={m: widths[m] for m in modalities},
    specific_dim=0,
    code_dims=(dims["common"], dims[others[0]]),
    layout={1: "parts", 2: "interleaved"}[config["seg_type"]],
    sharing="one" if config["share_codebook"] else "separate" if config["seperate_codebook"] else "parts",
    distance={"cos": "cosine", "l2": "l2"}[config["distance"]],
    normalize=config["norm_code"],
    ema=config["ema_update"],
    revive=ANCHORS[config["anchor"]],
    revive_mode="codes_only",
    detach_similarity=True,
  )


def read_books(data, prefix, books, ema=True):
  states = {}
  for book in books:
    fields = STATE if ema else ("codes", "usage")
    read = {field: jnp.asarray(data[f"{prefix}/{book}/{STATE[field]}"]) for field in fields}
    k, d = read["codes"].shape
    empty = compiled(codebook.init_codebook, num_codes=k, dim=d)(jax.random.key(0))
    states[name_of(book)] = empty.replace(**read)
  return states


@pytest.fixture(params=FILES)
def run(request):
  with np.load(GOLDEN / f"codebind_mvq_{request.param}.npz") as data:
    data = dict(data)
  modalities = [str(m) for m in data["meta/modalities"]]
  books = [str(b) for b in data["meta/codebooks"]]
  return data, modalities, books, spec_of(json.loads(str(data["meta/config"])), modalities)


def call(z, states, candidates, *, modality, spec, update):
  """Outputs and new codebooks of one call; gradients of sum(full^3) + 10 commitment and of commitment alone."""

  drawn = list(candidates)

  def objectives(z, codes):
    books = {name: states[name].replace(codes=codes[name]) for name in states}
    draw = (lambda *args, **kwargs: drawn.pop(0)) if candidates else draw_candidates
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(compositional, "draw_candidates", draw)
      outputs, new = compositional.quantize_modalities({modality: z}, books, spec, update=update)
    out = outputs[modality]
    return (jnp.sum(out.full**3) + 10 * out.commitment, out.commitment), (out, new)

  codes = {name: state.codes for name, state in states.items()}
  _, pullback, (out, new) = jax.vjp(objectives, z, codes, has_aux=True)
  return out, new, pullback((1.0, 0.0))[0], pullback((0.0, 1.0))


def check_outputs(data, key, modality, out, spec):
  close(out.shared, data[f"{key}/common"])
  close(out.specific, data[f"{key}/specific"])
  close(out.full, data[f"{key}/concat"])
  close(out.commitment, data[f"{key}/loss_codebook"])
  parts = [("common", out.indices_shared, out.similarity_shared)]
  if spec.specific_width(modality):
    parts.append(("specific", out.indices_specific, out.similarity_specific))
  for part, indices, similarity in parts:
    np.testing.assert_array_equal(indices, data[f"{key}/res_{part}/indices"])
    close(similarity, data[f"{key}/res_{part}/dist"])


def check_books(data, key, books, states, ema):
  for book in books:
    for field, column in STATE.items():
      if ema or field in ("codes", "usage"):
        close(getattr(states[name_of(book)], field), data[f"{key}/{book}/{column}"])


def test_three_training_steps_and_evaluation(run):
  data, modalities, books, spec = run
  states = read_books(data, "init", books, spec.ema)
  for step in range(3):
    for modality in modalities:
      key = f"step{step}/{modality}"
      candidates = [data[k] for k in (f"{key}/random_feat0", f"{key}/random_feat1") if k in data]
      out, new, both, (alone, grads) = call(
        data[f"{key}/z"], states, candidates, modality=modality, spec=spec, update="sequential"
      )
      check_outputs(data, key, modality, out, spec)
      close(both, data[f"{key}/grad_z"])
      close(alone, data[f"{key}/grad_z_codebook"])
      check_books(data, f"{key}/after", books, new, spec.ema)
      states = new
      if not spec.ema:
        for book in {"common", modality} & set(books):
          gradient = grads[name_of(book)]
          close(gradient, data[f"{key}/grad_w_codebook/{book}"])
          old = states[name_of(book)]
          states[name_of(book)] = old.replace(codes=old.codes - 0.5 * 10 * gradient)
        check_books(data, f"{key}/after_sgd", books, states, ema=False)
  for modality in modalities:
    out, new, *_ = call(data[f"eval/{modality}/z"], states, [], modality=modality, spec=spec, update="none")
    check_outputs(data, f"eval/{modality}", modality, out, spec)
    chex.assert_trees_all_equal(new, {name: states[name] for name in new})


def test_one_sequential_call_takes_the_modalities_in_turn(run):
  data, modalities, books, spec = run
  if not spec.ema or spec.revive == "random":
    pytest.skip("the recorded run does something between the calls")
  states = read_books(data, "init", books)
  features = {m: data[f"step0/{m}/z"] for m in modalities}
  _, states = compositional.quantize_modalities(features, states, spec, update="sequential")
  check_books(data, f"step0/{modalities[-1]}/after", books, states, ema=True)


@pytest.mark.parametrize("part", ["common", "specific"])
def test_code_losses_of_a_step(run, part):
  """The release's contrast is a mean over all tokens; the recorded rows suffice where there is one token."""
  data, modalities, _, spec = run
  states = read_books(data, "init", [str(b) for b in data["meta/codebooks"]], spec.ema)
  modality = modalities[0] if part == "common" else modalities[1]
  book = spec.codebook_names(modality)[part == "specific"]
  if part == "common":
    rows = data[f"step0/{modality}/res_common/dist"]
    close(
      compiled(losses.code_contrast, double_softmax=True)(rows.reshape(-1, rows.shape[-1])),
      data[f"step0/{modality}/res_common/loss_contra"],
    )
  elif spec.sharing == "parts":
    close(compiled(losses.code_uniform)(states[book].codes), data[f"step0/{modality}/res_specific/loss_uni"])


@pytest.mark.parametrize("distance", ["cos", "l2"])
@pytest.mark.parametrize("norm", ["norm", "raw"])
def test_kmeans(distance, norm):
  with np.load(GOLDEN / "codebind_kmeans.npz") as data:
    data = dict(data)
  prefix = f"{distance}_{norm}"
  rounds = [int(k.split("/iters")[1].split("/")[0]) for k in data if k.startswith(prefix) and k.endswith("means")]
  assert rounds
  for iterations in rounds:
    means, counts = codebook.kmeans(
      jax.random.key(0), data[f"{prefix}/samples"], 20, iterations=iterations,
      distance={"cos": "cosine", "l2": "l2"}[distance], init=data[f"{prefix}/means0"],
    )  # fmt: skip
    close(means, data[f"{prefix}/iters{iterations}/means"])
    np.testing.assert_array_equal(counts, data[f"{prefix}/iters{iterations}/bins"])
    assert np.min(data[f"{prefix}/iters{iterations}/bins"]) == 0


def test_kmeans_start_of_a_quantiser():
  with np.load(GOLDEN / "codebind_kmeans.npz") as data:
    data = dict(data)
  spec = compositional.CompositionalSpec(
    shared_dim=64, specific_dims={"text": 0, "vision": 32}, revive="none", revive_mode="codes_only"
  )
  states = compositional.new_codebooks(jax.random.key(0), spec, ["text", "vision"])
  started = set()
  for step in range(3):
    for modality in ("text", "vision"):
      key = f"mvq/step{step}/{modality}"
      if f"{key}/kmeans0/samples" in data:
        samples = data[f"{key}/kmeans0/samples"]
        name = "shared" if modality == "text" else "vision"
        # The samples are the first tokens' segments.
        segments = data[f"{key}/z"].reshape(6, -1, 96 if modality == "vision" else 64)[:, 0]
        segments = segments[:, 64:] if modality == "vision" else segments
        segments = np.asarray(compositional.split_segments(segments, 8)).reshape(-1, 8)
        close(segments / np.linalg.norm(segments, axis=1, keepdims=True), samples)
        init = data[f"{key}/kmeans0/means0"]
        means, counts = codebook.kmeans(jax.random.key(0), samples, init.shape[0], init=init)
        zeros = jnp.zeros_like(counts)
        states[name] = codebook.CodebookState(means, counts, means * counts[:, None], zeros, jnp.ones((), bool))
        started.add(name)
      outputs, states = compositional.quantize_modalities(
        {modality: data[f"{key}/z"]}, states, spec, update="sequential"
      )
      out = outputs[modality]
      np.testing.assert_array_equal(out.indices_shared, data[f"{key}/res_common/indices"])
      close(out.full, data[f"{key}/concat"])
      close(out.commitment, data[f"{key}/loss_codebook"])
      for book in started:
        recorded = "common" if book == "shared" else book
        for field, column in STATE.items():
          if field != "usage":
            close(getattr(states[book], field), data[f"{key}/after/{recorded}/{column}"])
  assert started == {"shared", "vision"}
