"""Every term of every method through the step: two sources, masks, groups, logit scales; expected values by hand."""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codebind_jax import losses
from codebind_jax.codebook import CodebookState, unified
from codebind_jax.compositional import CompositionalSpec
from codebind_jax.losses import prototypes
from codebind_jax.methods import centrobind, codebind, codis, dcid, fcid, fixed_anchor
from codebind_jax.methods.base import EXTRA
from codebind_jax.models.critics import ConditionalGaussian, FuturePredictor, club_fit
from codebind_jax.models.decoder import Decoder
from codebind_jax.runtime import optim
from codebind_jax.step import make_train_step
from codebind_jax.transport import ipot
from tests.step_fixtures import (
  DECODER,
  GROUPS,
  MASKS,
  SCALES,
  SHARED,
  SOURCES,
  SPECIFIC,
  batch_of,
  directed,
  features_of,
  mean_over_sources,
  model,
  setting,
  stage_of,
  unit,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
TAU = 0.3


def has(source: str, *names: str) -> np.ndarray:
  """Rows that have all of these modalities."""
  return np.all([np.array(MASKS[source, name], bool) for name in names], axis=0)


def pairs_of(stage: Any, source: str) -> list[tuple[str, str]]:
  """The stage's pairs of which the source has both sides."""
  return [(a, b) for a, b in stage.pairs if {a, b} <= set(SOURCES[source])]


def groups_of(source: str, *names: str) -> np.ndarray | None:
  """A caption fits all rows of a label; two sensors' rows of a label are told apart."""
  return np.array(GROUPS[source]) if "text" in names else None


def check(metrics: Any, expected: dict[str, dict[str, float]], weights: dict[str, float], stage: Any) -> None:
  """Each term against its mean over the sources, the total against the weighted sum, and that there is no other."""
  reserved = ("train/total", "train/gradient_norm")
  assert {f"train/{name}" for name in expected} == {k for k in metrics if k.startswith("train/")} - set(reserved)
  means = {name: mean_over_sources(values, stage) for name, values in expected.items()}
  for name, value in means.items():
    assert value != 0, name
    np.testing.assert_allclose(metrics[f"train/{name}"], value, rtol=3e-4, atol=1e-6, err_msg=name)
  total = sum(weights[name] * value for name, value in means.items())
  np.testing.assert_allclose(metrics["train/total"], total, rtol=3e-4)


# CodeBind

CODES, DIM, BETA, DECAY = {"shared": 12, "audio": 6, "image": 11}, 4, 0.25, 0.9
LOSSES = {
  "info_nce": 1.0, "info_nce_plain": 0.5, "commitment": 2.0, "code_contrast": 0.3, "code_uniform": 0.7,
  "code_matching": 1.1, "decomposition": 0.4, "decorrelation": 0.9, "specific_uniform": 0.6, "reconstruction": 0.8,
}  # fmt: skip


def cut(x: np.ndarray) -> np.ndarray:
  """[..., c] -> [..., segments, DIM], each of norm 1."""
  return unit(x.reshape(*x.shape[:-1], -1, DIM))


@pytest.fixture(scope="module")
def codebind_step():
  spec = CompositionalSpec(
    SHARED, specific_dims=SPECIFIC, code_dims=(DIM, DIM), num_codes=(CODES["shared"], 0), num_specific_codes=CODES,
    beta=BETA, decay=DECAY, revive="none",
  )  # fmt: skip
  stage = stage_of(losses=LOSSES, code_rows=4, matching_temperature=0.4)

  def full_books(state):
    rng = np.random.default_rng(2)
    books = {}
    for name, book in state.codebooks.items():
      codes, count = rng.normal(size=book.codes.shape), rng.uniform(1, 3, len(book.codes))
      parts = (jnp.asarray(x, jnp.float32) for x in (codes, count, codes * count[:, None], count / count.sum()))
      books[name] = CodebookState(*parts, jnp.ones((), bool))
    return state.replace(codebooks=books)

  start = setting(codebind.Method(model(decoder=True), spec), stage, tokens=2, change=full_books)
  batch = batch_of(tokens=2)
  return start, batch, start.step(start.state, batch)


def quantised(x: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(code vectors, indices, similarities) of segments [..., d]."""
  similarity = cut(x) @ unit(codes).T
  found = similarity.argmax(-1)
  return np.asarray(codes, np.float64)[found], found, similarity


def softmax(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def mean_distance(x: np.ndarray) -> float:
  """Log of the mean over pairs of exp(-|x_i - x_j|^2)."""
  a, b = np.triu_indices(len(x), 1)
  return np.log(np.mean(np.exp(-np.sum((x[a] - x[b]) ** 2, -1))))


def near_against_far(similarity: np.ndarray) -> float:
  """A row's largest similarities (a tenth) against its smallest (a half)."""
  x = np.sort(similarity.reshape(-1, similarity.shape[-1]))
  k = x.shape[1]
  positive = x[:, k - max(k // 10, 1) :].mean(1)
  return np.mean(np.log(np.exp(positive) + np.exp(x[:, : k // 2]).sum(1)) - positive)


def same_codes(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
  """Code matching of similarities [rows, segments, codes]."""
  p, q = softmax(a / temperature), softmax(b / temperature)
  score = np.einsum("isk,jsk->sij", p, np.log(q)) + np.einsum("isk,jsk->sij", np.log(p), q)
  return np.mean(np.log(np.exp(score).sum(2)) - np.diagonal(score, axis1=1, axis2=2))


def overlap(shared: np.ndarray, specific: np.ndarray) -> float:
  """Norm of the products of all shared with all specific tokens; of segments where the widths differ."""
  if shared.shape != specific.shape:
    shared, specific = (
      cut(x).reshape(len(x), -1, DIM) / np.sqrt(x.shape[2] // DIM) for x in (shared, specific)
    )  # fmt: skip
  return np.mean(np.linalg.norm(np.einsum("btd,bud->btu", shared, specific), axis=(1, 2)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Sum of the squared correlations of all features of the one with all of the other, over the root of their number."""
  both = np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]
  return np.sum(both**2) / np.sqrt(both.size)


def codebind_terms(start, batch):
  """Term -> source -> value."""
  stage, (method, params, books) = start.stage, (start.method, start.state.params, start.state.codebooks)
  codes = {name: np.asarray(book.codes) for name, book in books.items()}
  features, found = features_of(method, params, batch), {name: {} for name in LOSSES}
  book_of = lambda m: {"shared": codes["shared"]} | ({"specific": codes[m]} if SPECIFIC[m] else {})
  part_of = lambda m, x: {"shared": x[..., :SHARED], "specific": x[..., SHARED:]}
  # Commitment belongs to a modality, whose rows of all sources count alike.
  commitment = {}
  for m in CODES.keys() - {"shared"} | {"text"}:
    x = np.concatenate([features[s][m][has(s, m)] for s in SOURCES if m in SOURCES[s]])
    commitment[m] = BETA * sum(
      np.mean((quantised(part_of(m, x)[part], book)[0] - cut(part_of(m, x)[part])) ** 2)
      for part, book in book_of(m).items()
    )
  for source, names in SOURCES.items():
    out, plain, similar = {}, {}, {}
    for m in names:
      parts = part_of(m, features[source][m])
      made = {part: quantised(parts[part], book) for part, book in book_of(m).items()}
      flat = {part: vectors.reshape(*vectors.shape[:2], -1) for part, (vectors, _, _) in made.items()}
      out[m] = {part: unit(x) for part, x in flat.items()} | {"full": unit(np.concatenate(list(flat.values()), -1))}
      plain[m] = unit(parts["shared"])
      similar[m] = {part: similarity[:4, 0] for part, (_, _, similarity) in made.items()}
    first = {m: has(source, m)[:4] for m in names}
    own = [m for m in names if SPECIFIC[m]]

    def align(z, source=source):
      values = []
      for a, b in pairs_of(stage, source):
        tau = TAU / (SCALES[a] * SCALES[b])
        one = functools.partial(directed, temperature=tau, has=has(source, a, b), groups=groups_of(source, a, b))
        values.append(one(z[a][:, 0], z[b][:, 0]) + one(z[b][:, 0], z[a][:, 0]))
      return np.mean(values)

    found["info_nce"][source] = align({m: x["shared"] for m, x in out.items()})
    found["info_nce_plain"][source] = align(plain)
    found["commitment"][source] = sum(commitment[m] for m in names)
    found["code_contrast"][source] = sum(near_against_far(x[first[m]]) for m in names for x in similar[m].values())
    found["code_uniform"][source] = sum(mean_distance(unit(codes[name])) for name in ("shared", *own))
    found["code_matching"][source] = np.mean([
      same_codes(similar[a]["shared"][first[a] & first[b]], similar[b]["shared"][first[a] & first[b]], 0.4)
      for a, b in pairs_of(stage, source)
    ])
    parts = {m: {k: x[has(source, m)] for k, x in out[m].items()} for m in own}
    found["decomposition"][source] = np.mean([overlap(x["shared"], x["specific"]) for x in parts.values()])
    found["decorrelation"][source] = np.mean([
      correlation(x["shared"][:, 0], x["specific"][:, 0]) for x in parts.values()
    ])
    found["specific_uniform"][source] = np.mean([mean_distance(x["specific"][:, 0]) for x in parts.values()])
    total = 0.0
    for m in own:
      x = batch[source][m][has(source, m)].astype(np.float64)
      decode = jax.jit(Decoder((2,), x.shape[-1], (1,), cls_token=False, **DECODER).apply)
      made = decode({"params": params[m]["decoder"]}, jnp.asarray(parts[m]["full"], jnp.float32))
      target = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
      total += np.mean((np.asarray(made) - target) ** 2)
    found["reconstruction"][source] = total
  return found


def test_codebind_s_terms(codebind_step):
  start, batch, (_, metrics) = codebind_step
  check(metrics, codebind_terms(start, batch), LOSSES, start.stage)


def test_codebind_s_codebooks_and_usage_count_the_rows_that_have_the_modality(codebind_step):
  start, batch, (after, metrics) = codebind_step
  features = features_of(start.method, start.state.params, batch)
  for name, book in start.state.codebooks.items():
    counts, sums = np.zeros(len(book.codes)), np.zeros(book.codes.shape)
    for source, names in SOURCES.items():
      for m in names if name == "shared" else [name] if name in names else []:
        x = features[source][m][has(source, m)]
        x = x[..., :SHARED] if name == "shared" else x[..., SHARED:]
        np.add.at(counts, (found := quantised(x, book.codes)[1].reshape(-1)), 1)
        np.add.at(sums, found, cut(x).reshape(-1, DIM))
    new = after.codebooks[name]
    mass = DECAY * np.asarray(book.ema_count) + (1 - DECAY) * counts
    total = DECAY * np.asarray(book.ema_sum) + (1 - DECAY) * sums
    np.testing.assert_allclose(new.ema_count, mass, rtol=1e-5)
    smooth = (mass + 1e-5) / (mass.sum() + len(mass) * 1e-5) * mass.sum()
    np.testing.assert_allclose(new.codes, total / smooth[:, None], rtol=1e-4, atol=1e-5)
    share = counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(
      metrics[f"codebook/{name}/perplexity"], np.exp(-np.sum(share * np.log(share))), rtol=1e-5
    )


def codes_start(losses_of, codes=(".*",), **spec):
  """A setting whose codes are parameters, and the frozen paths of a stage that trains the codebooks `codes`."""
  spec = CompositionalSpec(
    SHARED, specific_dims=SPECIFIC, code_dims=(DIM, DIM), num_codes=(CODES["shared"], 0), num_specific_codes=CODES,
    beta=BETA, ema=False, revive="none", **spec,
  )  # fmt: skip
  stage, method = stage_of(losses=losses_of, codes=codes), codebind.Method(model(), spec)
  start = setting(method, stage)
  trained = (r"(?!method/).*", *method.trained_paths(stage))
  _, table = optim.make_optimizer(start.state.params, trained, optim.Optim(), 2)
  return setting(method, stage, frozen=optim.frozen(table))


def test_codes_that_are_parameters_move_by_the_gradient_of_their_terms():
  start = codes_start({"code_uniform": 0.7})
  after, metrics = start.step(start.state, batch_of())
  share = {"shared": 1.0, "image": 1.0, "audio": 0.75}  # of the sources' weights, 3 and 1, that have the modality
  for name, book in start.state.codebooks.items():
    gradient = jax.grad(losses.code_uniform)(book.codes)
    assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(
      after.codebooks[name].codes, book.codes - 0.1 * 0.7 * share[name] * gradient, rtol=1e-5, atol=1e-6
    )
    assert not np.any(after.params[EXTRA]["codes"][name])
  # The next step begins where this one ended.
  _, again = start.step(after, batch_of())
  assert float(again["train/code_uniform"]) < float(metrics["train/code_uniform"])


def test_a_stage_trains_those_codes_alone_that_it_names():
  start = codes_start({"commitment": 1.0}, codes=("shared", "ima.*"))
  after, _ = start.step(start.state, batch_of())
  moved = {name for name, book in after.codebooks.items()
           if np.any(book.codes != start.state.codebooks[name].codes)}  # fmt: skip
  assert moved == {"shared", "image"}


def test_the_release_s_forms_of_two_terms_can_be_chosen(codebind_step):
  start, batch, (_, plain) = codebind_step
  stage = dataclasses.replace(start.stage, scale_inside_cosine=True, double_softmax=True)
  metrics = jax.jit(make_train_step(start.method, stage, optax.sgd(0.1)))(start.state, batch)[1]
  changed = {name for name in LOSSES if not np.isclose(metrics[f"train/{name}"], plain[f"train/{name}"], rtol=1e-5)}
  assert changed == {"info_nce", "info_nce_plain", "code_contrast"}
  # The cosine cancels the scales, whatever they are.
  params = start.state.params | {
    name: value + 1.0 for name, value in start.state.params.items() if name.endswith("logit_scale")
  }
  other = jax.jit(make_train_step(start.method, stage, optax.sgd(0.1)))(start.state.replace(params=params), batch)[1]
  np.testing.assert_allclose(other["train/info_nce"], metrics["train/info_nce"], rtol=1e-5)


# CentroBind and the fixed anchor


def z_of(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Unit embeddings of the class tokens' shared parts."""
  return {m: unit(x[:, 0, :SHARED]) for m, x in features.items()}


def temperature_of(source: str) -> float:
  """TAU over the square of the geometric mean of the modalities' logit scales."""
  return TAU / np.prod([SCALES[m] for m in SOURCES[source]]) ** (2 / len(SOURCES[source]))


def test_centrobind_s_terms():
  weight = {"image": 2.0, "text": 0.5, "audio": 1.0}
  method = centrobind.Method(model(), weights_of=(("image", 2.0), ("text", 0.5)))
  start, batch = setting(method, stage_of(), 2), batch_of(2)
  _, metrics = start.step(start.state, batch)
  found = {"centrobind": {}, "alignment_gap": {}}
  for source, x in features_of(start.method, start.state.params, batch).items():
    z, here = z_of(x), {m: has(source, m) for m in x}

    def middle(weight, z=z, here=here):
      mass = sum(weight[m] * here[m] for m in z)
      return sum(weight[m] * here[m][:, None] * z[m] for m in z) / np.maximum(mass, 1e-9)[:, None]

    one = functools.partial(directed, temperature=temperature_of(source), groups=np.array(GROUPS[source]))
    mean = middle(weight)
    found["centrobind"][source] = sum(one(mean, z[m], has=here[m]) + one(z[m], mean, has=here[m]) for m in z)
    some = np.any(list(here.values()), axis=0)
    found["alignment_gap"][source] = 1 - np.mean(np.sum(middle(dict.fromkeys(z, 1.0))[some] ** 2, -1))
  check(metrics, found, {"centrobind": 1.0, "alignment_gap": 0.0}, start.stage)


def test_fixed_anchor_s_term():
  start, batch = setting(fixed_anchor.Method(model()), stage_of(), 2), batch_of(2)
  _, metrics = start.step(start.state, batch)
  found = {}
  for source, x in features_of(start.method, start.state.params, batch).items():
    z = z_of(x)
    found[source] = 0.0
    for m in z.keys() - {"image"}:
      one = functools.partial(directed, temperature=temperature_of(source), has=has(source, "image", m),
                              groups=groups_of(source, m))  # fmt: skip
      found[source] += one(z["image"], z[m]) + one(z[m], z["image"])
  check(metrics, {"fixed_anchor": found}, {"fixed_anchor": 1.0}, start.stage)


# CODIS

PROTOTYPES, QUEUE, ALPHA, GAMMA, CODE_WEIGHT = 5, 20, 0.25, 0.2, 0.6


def contrast_of(student, query, keys, queue, tau, groups=None):
  """Soft cross-entropy of a student's similarities to teacher keys, of the batch and of a queue."""
  valid = np.asarray(queue.valid)
  keys, others = np.concatenate([keys, np.asarray(queue.features)[valid]]), np.asarray(queue.groups)[valid]
  out = np.zeros((len(student), len(keys)), bool)
  if groups is not None:
    out = groups[:, None] == np.concatenate([groups, others])
    np.fill_diagonal(out, False)
  scores = lambda x: np.where(out, -np.inf, np.asarray(x, np.float64) @ keys.T / tau)
  target = (1 - ALPHA) * np.eye(len(student), len(keys)) + ALPHA * softmax(scores(query))
  return -np.mean(np.sum(target * np.log(np.maximum(softmax(scores(student)), 1e-300)), 1))


@pytest.fixture(scope="module")
def codis_step():
  method = codis.Method(
    model(), codes=PROTOTYPES, queue=QUEUE, decay=0.8, alpha=ALPHA, gamma=GAMMA, step=0.4, iterations=8,
    code_weight=CODE_WEIGHT,
  )  # fmt: skip
  rng = np.random.default_rng(4)

  def apart(state):
    """A teacher that is not the student, and queues that hold something, some of it of the batch's labels."""
    teacher = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), state.params)
    teacher = {name: value for name, value in teacher.items() if name != EXTRA}
    old = lambda: jnp.asarray(unit(rng.normal(size=(4, SHARED))), jnp.float32)
    queue = {m: prototypes.enqueue(q, old(), None, np.array([0, 3, 100, 101])) for m, q in state.aux["queue"].items()}
    return state.replace(aux={"teacher": teacher, "queue": queue})

  start, batch = setting(method, stage_of(), 2, apart), batch_of(2)
  return start, batch, start.step(start.state, batch)


def test_codis_s_terms_teacher_and_queues(codis_step):
  start, batch, (after, metrics) = codis_step
  params, aux = start.state.params, start.state.aux
  student = {name: value for name, value in params.items() if name != EXTRA}
  teacher = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, aux["teacher"], student)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.aux["teacher"], teacher)

  codes, queues, assign = params[EXTRA]["codes"], dict(aux["queue"]), jax.jit(
    functools.partial(prototypes.assign, plan=functools.partial(ipot, beta=0.4, outer=8))
  )
  found, used = {"contrast": {}, "transport": {}, "swapped": {}}, []
  of_student, of_teacher = (features_of(start.method, p, batch) for p in (params, teacher))
  for number, source in enumerate(SOURCES):
    z, t = ({m: np.float32(x) for m, x in z_of(f[source]).items()} for f in (of_student, of_teacher))
    # Rows of different sources are never of one label.
    groups = np.array(GROUPS[source]) * 2 + number
    plans, cost = {}, {}
    for m in z:
      here = t[m][has(source, m)]
      plan = np.asarray(assign(here, codes))
      cost[m] = float(np.sum(plan * (1 - unit(here) @ unit(codes).T)))
      used.extend(plan.argmax(1))
      plans[m] = np.zeros((len(z[m]), PROTOTYPES))
      plans[m][has(source, m)] = plan * len(here)
    contrast, swapped = [], []
    for a, b in pairs_of(start.stage, source):
      both = has(source, a, b)
      contrast.append(np.mean([
        contrast_of(z[query][both], t[query][both], t[key][both], queues[key], temperature_of(source),
                    groups[both] if "text" in (query, key) else None)
        for query in (a, b) for key in (a, b)
      ]))  # fmt: skip
      logs = {m: np.log(softmax(unit(z[m]) @ unit(codes).T / GAMMA)) for m in z}
      swapped.append(sum(-np.mean(np.sum(plans[own] * logs[other], 1)[both]) for own, other in ((a, b), (b, a))))
    found["contrast"][source], found["swapped"][source] = np.mean(contrast), np.mean(swapped)
    found["transport"][source] = np.mean([cost[a] + cost[b] for a, b in pairs_of(start.stage, source)])
    # What one source's rows leave in the queues is the next one's negatives.
    queues |= {m: prototypes.enqueue(queues[m], t[m], has(source, m), groups) for m in t}
  check(metrics, found, {"contrast": 1.0, "transport": CODE_WEIGHT, "swapped": CODE_WEIGHT}, start.stage)
  for m, queue in queues.items():
    new = after.aux["queue"][m]
    np.testing.assert_allclose(np.asarray(new.features)[np.asarray(new.valid)],
                               np.asarray(queue.features)[np.asarray(queue.valid)], atol=1e-5)  # fmt: skip
    assert int(new.pointer) == int(queue.pointer) == {"audio": 12, "image": 18, "text": 18}[m]
    np.testing.assert_array_equal(new.valid, queue.valid)
    np.testing.assert_array_equal(new.groups, queue.groups)
  share = np.bincount(used) / len(used)
  share = share[share > 0]
  np.testing.assert_allclose(metrics["codebook/shared/perplexity"], np.exp(-np.sum(share * np.log(share))), rtol=1e-5)


# DCID, H-DCID, FCID

WEIGHTS = {"commitment": 0.7, "matching": 0.5, "club": 0.3, "coding": 1.1, "reconstruction": 0.9}
SMALL = {"codes": 6, "first_codes": "uniform", "decay": 0.7, "reset_after": 0, "club_steps": 2, "club_hidden": 4,
         "club_rate": 0.05, "cpc_self": 0.2, **WEIGHTS}  # fmt: skip


def spread(state):
  """Codes as large as the features, so that several are chosen."""
  rng = np.random.default_rng(6)
  books = {
    name: unified.new_unified(jnp.asarray(0.6 * rng.normal(size=book.codes.shape), jnp.float32), sorted(book.idle))
    for name, book in state.codebooks.items()
  }  # fmt: skip
  return state.replace(codebooks=books)


@contextlib.contextmanager
def next_row():
  """CLUB's negatives are the next row's, so that no key enters."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.random, "permutation", lambda rng, n: jnp.roll(jnp.arange(n), 1))
    yield


def both_commitments(z, codes, source):
  """Every modality's vectors to their own codes, and at half weight to their partners', where both are there."""
  total = 0.0
  for a, b in itertools.product(z, z):
    weight = 1.0 if a == b else 0.5 / max(len(z) - 1, 1)
    total += 0.25 * weight * np.mean(np.sum((z[a] - codes[b])[has(source, a, b)] ** 2, -1))
  return total


def matching(z, codes, source):
  """Code matching of every two modalities, from the mean over the steps of their probabilities of the codes."""
  distance = lambda x: np.linalg.norm(np.asarray(x, np.float64)[..., None, :] - np.asarray(codes), axis=-1)
  shares, total = {m: softmax(-distance(x)).mean(1) for m, x in z.items()}, 0.0
  for a, b in itertools.combinations(sorted(z), 2):
    both, groups = has(source, a, b), groups_of(source, a, b)
    p, q = shares[a][both], shares[b][both]
    score = p @ np.log(q + 1e-10).T + q @ np.log(p + 1e-10).T
    against = np.exp(score)
    if groups is not None:
      against[(groups[both][:, None] == groups[both]) & ~np.eye(len(score), dtype=bool)] = 0
    total += np.mean(np.log(against.sum(1) + 1e-5 * np.exp(score.min())) - np.diag(score))
  return total


def coding(z, source, extra, prefix="predict_"):
  """CPC over three steps; of fewer, InfoNCE of the first ones at the stage's temperature."""
  steps, total = next(iter(z.values())).shape[1], 0.0
  for a, b in itertools.product(z, z):
    both, groups = has(source, a, b), groups_of(source, a, b)
    if steps < 3:
      total += directed(unit(z[a][:, 0]), unit(z[b][:, 0]), TAU, both, groups) if a != b else 0.0
      continue
    # Of three steps, two are the context and one is the future.
    ahead = jax.jit(FuturePredictor(SHARED).apply)({"params": extra[f"{prefix}{a}"]}, z[a])[:, 1, 0]
    total += (0.2 if a == b else 1.0) * directed(ahead, z[b][:, 2], 1.0, both, groups)
  return total


def layer(params, x):
  """A dense layer."""
  return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def club(general, own, here, aux, name):
  """(the estimate under the network fitted to these rows, aux with that network)."""
  x, y = (jnp.asarray(part, jnp.float32) for part in (general, own))
  fit = jax.jit(functools.partial(club_fit, ConditionalGaussian(own.shape[-1], 4), steps=2, learning_rate=0.05))
  fitted = fit(aux["club"][name], x, y, mask=jnp.asarray(here))

  def network(part):
    h = np.asarray(general, np.float64)
    for i in range(3):
      h = np.maximum(layer(fitted["params"][f"{part}{i}"], h), 0)
    return layer(fitted["params"][f"{part}3"], h)

  mu, variance = network("mean"), np.exp(np.tanh(network("logvar")))
  likelihood = lambda y: -0.5 * np.mean(np.sum((mu - y) ** 2 / variance, -1), -1)
  value = (likelihood(own) - likelihood(np.roll(own, 1, axis=0)))[here & np.roll(here, 1)]
  return np.mean(value), {"club": aux["club"] | {name: fitted}}


def rebuilt(params, vectors, own, target, here):
  """Error of a token decoder over the rows that count."""
  made = layer(params["token"], np.concatenate([layer(params["code"], vectors), own], -1))
  return np.mean((made - target)[here] ** 2)


def nearest(x, codes):
  """The code nearest to each vector."""
  codes = np.asarray(codes)
  return codes[np.argmin(np.sum((x[..., None, :] - codes) ** 2, -1), -1)]


def updated(book, z, source):
  """The codebook after one source's rows."""
  z = {m: jnp.asarray(x, jnp.float32) for m, x in z.items()}
  indices = {m: np.argmin(np.sum((x[..., None, :] - book.codes) ** 2, -1), -1) for m, x in z.items()}
  return unified.update_unified(book, z, indices, decay=0.7, masks={m: has(source, m) for m in z})


def close(new, expected):
  """Two trees, entry by entry."""
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), new, expected)


def dcid_steps(tokens, levels):
  """One step of DCID with three tokens, of H-DCID with one, after which the second level counts."""
  change = lambda state: spread(state.replace(aux=state.aux | {"step": jnp.ones((), jnp.int32)}))
  method = dcid.Method(model(), **SMALL, levels=levels, second_after=1, second_weight=0.3)
  start, batch = setting(method, stage_of(), tokens, change), batch_of(tokens)
  with next_row():
    return start, batch, start.step(start.state, batch)


@pytest.fixture(scope="module")
def hdcid_step():
  return dcid_steps(1, 2)


def test_dcid_s_terms_codebooks_and_networks():
  check_dcid(*dcid_steps(3, 1))


def test_h_dcid_s_terms_codebooks_and_networks(hdcid_step):
  check_dcid(*hdcid_step)


def check_dcid(start, batch, stepped):
  """All that a step of DCID gives, by hand."""
  (after, metrics), levels = stepped, start.method.levels
  params, aux, books = start.state.params, start.state.aux, dict(start.state.codebooks)
  extra, found = params[EXTRA], {name: {} for name in WEIGHTS}
  for source, x in features_of(start.method, params, batch).items():
    z = {m: value[..., :SHARED] for m, value in x.items()}
    own = {m: np.maximum(value[..., SHARED:], 0) for m, value in x.items()}
    parts = [("shared", "", "", 1.0, z, own, {m: batch[source][m] for m in z})]
    if levels == 2:
      deeper = {m: layer(extra[f"second_{m}"]["general"], own[m]) for m in own if SPECIFIC[m]}
      rest = {m: np.maximum(layer(extra[f"second_{m}"]["specific"], own[m]), 0) for m in deeper}
      parts.append(("second", "second_", "2", 0.3, deeper, rest, {m: own[m] for m in deeper}))
    values = dict.fromkeys(WEIGHTS, 0.0)
    values["matching"] = matching(z, books["shared"].codes, source)
    for name, prefix, digit, weight, general, specific, targets in parts:
      codes = {m: nearest(v, books[name].codes) for m, v in general.items()}
      values["commitment"] += weight * both_commitments(general, codes, source)
      values["coding"] += weight * coding(general, source, extra, f"predict{digit}_")
      for m, v in general.items():
        params_of = extra[f"decode{digit}_{m}"]
        values["reconstruction"] += weight * rebuilt(params_of, codes[m], specific[m], targets[m], has(source, m))
        if SPECIFIC[m]:
          value, aux = club(v, specific[m], has(source, m), aux, f"{prefix}{m}")
          values["club"] += weight * value
      books[name] = updated(books[name], general, source)
    for name, value in values.items():
      found[name][source] = value
  check(metrics, found, WEIGHTS, start.stage)
  close(after.codebooks, books)
  close({name: net["params"] for name, net in after.aux["club"].items()},
        {name: net["params"] for name, net in aux["club"].items()})  # fmt: skip
  assert int(after.aux["step"]) == 2


@pytest.fixture(scope="module")
def fcid_step():
  start, batch = setting(fcid.Method(model(), **SMALL, contrast=1.3), stage_of(), 2, spread), batch_of(2)
  with next_row():
    return start, batch, start.step(start.state, batch)


def test_fcid_s_terms_codebook_and_networks(fcid_step):
  weights = WEIGHTS | {"contrast": 1.3}
  start, batch, (after, metrics) = fcid_step
  params, aux, book = start.state.params, start.state.aux, start.state.codebooks["shared"]
  extra, found = params[EXTRA], {name: {} for name in weights}
  for source, x in features_of(start.method, params, batch).items():
    z = {m: value[..., :SHARED] for m, value in x.items()}
    own = {m: np.maximum(value[..., SHARED:], 0) for m, value in x.items()}
    group = {m: "hub" if m == "text" else "sensors" for m in z}
    u = {m: layer(extra["coarse"][f"{group[m]}_compress"], v.mean(1, keepdims=True)) for m, v in z.items()}
    general, specific = ({m: np.maximum(layer(extra["coarse"][f"{group[m]}_{part}"], v), 0) for m, v in u.items()}
                         for part in ("general", "specific"))  # fmt: skip
    codes, here = {m: nearest(v, book.codes) for m, v in general.items()}, {m: has(source, m) for m in z}
    fine = [m for m in sorted(z) if m != "text"]
    found["commitment"][source] = both_commitments(general, codes, source)
    found["matching"][source] = matching(general, book.codes, source)
    found["coding"][source] = coding({m: z[m] for m in fine}, source, extra)
    head = {m: unit(v[:, 0]) for m, v in general.items()}
    found["contrast"][source] = sum(
      directed(head[m], head["text"], TAU, has(source, m, "text"), np.array(GROUPS[source])) for m in fine
    )
    found["reconstruction"][source] = sum(
      rebuilt(extra[f"coarse_decode_{m}"], codes[m], specific[m], u[m], here[m]) for m in z
    ) + sum(rebuilt(extra[f"decode_{m}"], z[m], own[m], batch[source][m], here[m]) for m in fine)
    joined = lambda values, names: np.concatenate([values[m] for m in names])
    compared = {m: (z[m], own[m], here[m]) for m in fine}
    for name, members in (("coarse_sensors", fine), ("coarse_hub", ["text"])):
      compared[name] = tuple(joined(values, members) for values in (general, specific, here))
    found["club"][source] = 0.0
    for name, compared_of in compared.items():
      value, aux = club(*compared_of, aux, name)
      found["club"][source] += value
    book = updated(book, general, source)
  check(metrics, found, weights, start.stage)
  close(after.codebooks, {"shared": book})
  close({name: net["params"] for name, net in after.aux["club"].items()},
        {name: net["params"] for name, net in aux["club"].items()})  # fmt: skip


def test_fcid_s_contrast_in_both_directions(fcid_step):
  start, batch, (_, one_way) = fcid_step
  both = setting(fcid.Method(model(), **SMALL, contrast=1.3, both_ways=True), stage_of(), 2, spread)
  with next_row():
    _, metrics = both.step(both.state, batch)
  params, back = start.state.params, {}
  for source, x in features_of(start.method, params, batch).items():
    coarse = lambda m, v: layer(params[EXTRA]["coarse"][f"{'hub' if m == 'text' else 'sensors'}_{v[0]}"], v[1])
    head = {}
    for m, value in x.items():
      u = coarse(m, ("compress", value[..., :SHARED].mean(1, keepdims=True)))
      head[m] = unit(np.maximum(coarse(m, ("general", u)), 0)[:, 0])
    back[source] = sum(directed(head["text"], head[m], TAU, has(source, m, "text"), np.array(GROUPS[source]))
                       for m in sorted(head) if m != "text")  # fmt: skip
  gained = mean_over_sources(back, start.stage)
  np.testing.assert_allclose(metrics["train/contrast"], one_way["train/contrast"] + gained, rtol=3e-4)
  assert abs(gained - one_way["train/contrast"]) > 1e-3
  np.testing.assert_allclose(metrics["train/total"], one_way["train/total"] + 1.3 * gained, rtol=3e-4)


# What the rows that lack a modality hold there


@pytest.mark.parametrize("name, tokens", [
  ("codebind_step", 2), ("codis_step", 2), ("hdcid_step", 1), ("fcid_step", 2),
])
def test_what_rows_hold_where_they_lack_a_modality_changes_nothing(name, tokens, request):
  start, batch, (after, metrics) = request.getfixturevalue(name)
  other = batch_of(tokens, hidden=-5.0)
  assert all((batch[s][m] != other[s][m]).any() for s, m in MASKS)
  with next_row():
    again, found = start.step(start.state, other)
  assert {key for key in found if key.endswith("perplexity")} >= {"codebook/shared/perplexity"}
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, metrics)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
               (again.params, again.codebooks), (after.params, after.codebooks))  # fmt: skip


def test_h_dcid_s_second_level_counts_after_its_steps(hdcid_step):
  start, batch, (_, metrics) = hdcid_step
  with next_row():
    _, early = start.step(start.state.replace(aux=start.state.aux | {"step": jnp.zeros((), jnp.int32)}), batch)
  np.testing.assert_allclose(early["train/matching"], metrics["train/matching"], rtol=1e-5)
  for term in ("commitment", "coding", "club", "reconstruction"):
    assert early[f"train/{term}"] != metrics[f"train/{term}"], term
  assert early["codebook/second/perplexity"] == metrics["codebook/second/perplexity"], "it learns from the start"


# Embeddings


def test_codis_embeds_the_student_and_names_the_nearest_code(codis_step):
  start, batch, _ = codis_step
  codes = np.asarray(start.state.params[EXTRA]["codes"])
  features = features_of(start.method, start.state.params, batch)["near"]
  for m, out in start.method.embed(start.state.params, {}, jax.tree.map(jnp.asarray, features)).items():
    z = unit(features[m][..., :SHARED])
    np.testing.assert_allclose(out.shared, z, atol=1e-5)
    np.testing.assert_array_equal(out.indices_shared[..., 0], (z @ unit(codes).T).argmax(-1))


def test_h_dcid_embeds_the_codes_of_both_levels(hdcid_step):
  start, batch, _ = hdcid_step
  params, books = start.state.params, start.state.codebooks
  features = features_of(start.method, params, batch)["near"]
  for m, out in start.method.embed(params, books, jax.tree.map(jnp.asarray, features)).items():
    own = np.maximum(features[m][..., SHARED:], 0)
    np.testing.assert_allclose(out.shared, unit(nearest(features[m][..., :SHARED], books["shared"].codes)), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(books["shared"].codes)[out.indices_shared[..., 0]],
                                  nearest(features[m][..., :SHARED], books["shared"].codes))  # fmt: skip
    if SPECIFIC[m]:
      deeper = nearest(layer(params[EXTRA][f"second_{m}"]["general"], own), books["second"].codes)
      np.testing.assert_allclose(out.specific, unit(deeper), atol=1e-5)
      np.testing.assert_array_equal(np.asarray(books["second"].codes)[out.indices_specific[..., 0]], deeper)


def test_fcid_embeds_the_coarse_code_of_every_token(fcid_step):
  start, batch, _ = fcid_step
  params, codes = start.state.params, start.state.codebooks["shared"].codes
  features = features_of(start.method, params, batch)["near"]
  for m, out in start.method.embed(params, start.state.codebooks, jax.tree.map(jnp.asarray, features)).items():
    x, coarse, group = features[m], params[EXTRA]["coarse"], "hub" if m == "text" else "sensors"
    general = np.maximum(layer(coarse[f"{group}_general"], layer(coarse[f"{group}_compress"], x[..., :SHARED])), 0)
    np.testing.assert_allclose(out.shared, unit(nearest(general, codes)), atol=1e-5)
    if SPECIFIC[m]:
      own = np.maximum(x[..., SHARED:], 0)
      np.testing.assert_allclose(np.asarray(out.specific) * np.linalg.norm(own, axis=-1, keepdims=True), own, atol=1e-4)
