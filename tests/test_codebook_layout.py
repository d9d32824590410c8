"""What the quantiser becomes on TPU and GPU: segments stay on lanes, and no matrix of similarities is written."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from codebind_jax import compositional
from codebind_jax.codebook import nearest, revival, segments
from codebind_jax.codebook.nearest import nearest_code, nearest_segments
from codebind_jax.codebook.nearest_triton import nearest_by_triton

SPEC = compositional.CompositionalSpec(shared_dim=64, specific_dim=32, num_codes=(48, 24))
B, T = 32, 9
SEGMENTS = B * T * 8


def training_call(spec=SPEC):
  """A jitted call with gradients, and the shapes of its arguments."""

  def loss(features, codebooks):
    outputs, new = compositional.quantize_modalities(features, codebooks, spec, rng=jax.random.key(0))
    return sum(jnp.sum(out.full**3) + out.commitment for out in outputs.values()), new

  states = jax.eval_shape(lambda: compositional.new_codebooks(jax.random.key(0), spec, ["text", "image"]))
  shapes = {"text": (B, 64), "image": (B, T, 96)}
  features = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  return jax.jit(jax.value_and_grad(loss, has_aux=True)), (features, states)


def narrow_arrays(text, pattern):
  """Shapes of float32 arrays of at least a modality's segments whose last axis is as narrow as a code."""
  shapes = [tuple(int(n) for n in re.split("[x,]", match)) for match in re.findall(pattern, text)]
  return {s for s in shapes if s[-1] <= 16 and np.prod(s[:-1]) >= SEGMENTS // 2}


def test_no_narrow_array_of_segments_is_lowered_for_tpu():
  step, arguments = training_call()
  pattern = r"tensor<((?:\d+x)+\d+)xf32>"
  found = {
    platform: narrow_arrays(step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text(), pattern)
    for platform in ("tpu", "cpu")
  }
  assert not found["tpu"]
  # On CPU the scatter takes rows, which shows that the search for them works.
  assert found["cpu"]


def test_each_platform_gets_its_own_search():
  def text(platform, d):
    shapes = jax.ShapeDtypeStruct((3, d, 512), jnp.float32), jax.ShapeDtypeStruct((64, d), jnp.float32)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")  # Triton asks what it lowers for
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
      return jax.jit(nearest_segments).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

  assert "stablehlo.while" in text("cpu", 8) and "dot_general" not in text("cpu", 8)
  assert "dot_general" in text("tpu", 8) and "stablehlo.while" not in text("tpu", 8)
  assert "triton" in text("cuda", 8) and "dot_general" not in text("cuda", 8)
  assert "dot_general" in text("cuda", 40) and "triton" not in text("cuda", 40)
  assert "dot_general" in text("rocm", 8) and "triton" not in text("rocm", 8)


def test_the_search_of_other_platforms_agrees_and_takes_nan_for_nothing():
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(3, 8, 40)).astype(np.float32), jnp.asarray(rng.normal(size=(24, 8)), jnp.float32)
  z[1, 2, 5] = np.nan
  found = nearest._argmax_lanes(jnp.asarray(z), codes, jnp.zeros(24))
  np.testing.assert_array_equal(found, nearest._scan_codes(jnp.asarray(z), codes, jnp.zeros(24)))
  assert found[1, 5] == 0
  some = jnp.asarray([[1.0, jnp.nan, 3.0], [jnp.nan] * 3])
  np.testing.assert_array_equal(nearest._argmax(some), [2, 0])


def test_the_program_of_nvidia_agrees_with_ties_and_nan_and_any_number_of_codes():
  rng = np.random.default_rng(0)
  z, codes = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((3, 8, 700), (61, 8)))
  bias = rng.integers(0, 3, 61).astype(np.float32)
  z[1, 2, 5] = np.nan
  found = nearest_by_triton(jnp.asarray(z), jnp.asarray(codes), jnp.asarray(bias), interpret=True)
  np.testing.assert_array_equal(found, nearest._scan_codes(jnp.asarray(z), jnp.asarray(codes), jnp.asarray(bias)))


def test_sums_by_integers_are_exact_in_any_order():
  rng = np.random.default_rng(0)
  vectors, indices = rng.normal(size=(3, 6, 400)).astype(np.float32), rng.integers(0, 32, (3, 400)).astype(np.int32)
  vectors[:, 3] *= 1e-5
  vectors[:, 4] = 0
  want = np.zeros((32, 6))
  np.add.at(want, indices.reshape(-1), np.moveaxis(vectors, 1, 2).reshape(-1, 6).astype(np.float64))
  got = segments._integer_sums(jnp.asarray(vectors), jnp.asarray(indices), 32)
  # An element is off by at most half of its last bit, 2^-26 of the largest; the largest sum is rounded to float32.
  largest = np.abs(vectors).max(axis=(0, 2))
  assert np.all(np.abs(got - want) <= largest * 400 * 3 / 32 * 2 * 2.0**-26 + np.abs(want) * 2.0**-23)
  order = rng.permutation(400)
  other = segments._integer_sums(jnp.asarray(vectors[:, :, order]), jnp.asarray(indices[:, order]), 32)
  np.testing.assert_array_equal(got, other)
  assert not np.any(segments._integer_sums(jnp.zeros((1, 6, 0)), jnp.zeros((1, 0), jnp.int32), 32))
  vectors[0, 2, 7] = np.nan
  bad = segments._integer_sums(jnp.asarray(vectors), jnp.asarray(indices), 32)
  np.testing.assert_array_equal(np.isnan(bad), np.broadcast_to(np.arange(6) == 2, (32, 6)))


def test_a_gpu_s_copies_of_a_count_add_up():
  rng = np.random.default_rng(1)
  for size, width, copies in ((32, 1, 64), (32, 6, 64), (2**15, 8, 4), (2**20, 9, 1)):
    indices = rng.integers(0, 32, (3, 400)).astype(np.int32)
    found, where = segments._copied(jnp.asarray(indices), size, width)
    assert found == copies and int(where.max()) < copies * size
    counts = np.bincount(where, minlength=copies * size).reshape(copies, size)
    np.testing.assert_array_equal(counts.sum(0)[:32], np.bincount(indices.reshape(-1), minlength=32))
    # Neighbours of one code are added to different copies.
    np.testing.assert_array_equal(np.asarray(where) // size, np.arange(1200) % copies)
  counts = segments.code_counts(jnp.asarray(indices), 32)
  np.testing.assert_array_equal(counts, np.bincount(indices.reshape(-1), minlength=32))
  # All in one code: with a single copy it overflows if the parts of a number are too long for so many.
  vectors, first = np.ones((1, 2, 2**18), np.float32), jnp.zeros((1, 2**18), jnp.int32)
  for size in (4, 2**20):
    found = segments._integer_sums(jnp.asarray(vectors), first, size)
    assert found.shape == (size, 2) and np.array_equal(found[0], [2**18] * 2) and not np.any(found[1:])


def test_the_scan_on_cpu_computes_each_score_once():
  shapes = jax.ShapeDtypeStruct((1, 8, 4096), jnp.float32), jax.ShapeDtypeStruct((64, 8), jnp.float32)
  text = jax.jit(nearest_segments).lower(*shapes).compile().as_text()
  products = [computation.count(" multiply(") for computation in text.split("\n\n")]
  assert [count for count in products if count >= 32] == [32 * 8], products


@pytest.mark.parametrize("shape", [(5, 24), (16, 3), (17, 40), (100, 24), (128, 7)])
def test_transposed_in_blocks(shape, monkeypatch):
  monkeypatch.setattr(segments, "_CACHED", 0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  np.testing.assert_array_equal(segments.transposed(x), x.T)
  value, pullback = jax.vjp(lambda x: segments.transposed(x) ** 2, x)
  np.testing.assert_allclose(pullback(value)[0], 2 * x**3, rtol=1e-6)


def test_codes_are_looked_up_alike_by_index_and_by_product():
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.normal(size=(24, 8)), jnp.float32)
  indices = jnp.asarray(rng.integers(0, 24, (3, 40)), jnp.int32)
  by_product = segments._one_hot_look_up(codes, indices)
  np.testing.assert_array_equal(by_product, np.moveaxis(np.asarray(codes)[np.asarray(indices)], 2, 1))
  np.testing.assert_array_equal(by_product, segments._take(codes, indices))
  np.testing.assert_array_equal(by_product, segments.look_up(codes, indices))


def test_candidates_are_drawn_alike_by_rows_and_by_lanes():
  rng = np.random.default_rng(0)
  vectors = jnp.asarray(rng.normal(size=(3, 8, 40)), jnp.float32)
  segment, token = (jnp.asarray(rng.integers(0, high, 24), jnp.int32) for high in (3, 40))
  expected = np.stack([np.asarray(vectors)[s, :, t] for s, t in zip(segment, token)])
  np.testing.assert_array_equal(revival._rows_by_lanes(vectors, segment, token), expected)
  np.testing.assert_array_equal(revival._rows(vectors, segment, token), expected)


def tpu_devices(monkeypatch):
  pytest.importorskip("libtpu")
  for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def compiled_for(device, function, *shapes):
  sharding = jax.sharding.SingleDeviceSharding(device)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  folder = jax.config.jax_compilation_cache_dir
  use_cache(None)  # a program for another platform cannot be read back here
  try:
    return jax.jit(function).lower(*jax.tree.map(place, shapes)).compile()
  finally:
    use_cache(folder)


def use_cache(folder):
  jax.config.update("jax_compilation_cache_dir", folder)
  compilation_cache.reset_cache()


LARGE = [(1_048_576, 1024, 8), (65_536, 8192, 256)]

# What XLA's NVIDIA compiler asks of a device; the numbers are those of an H100.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
}
"""


def gpu_device():
  """An NVIDIA GPU to compile for, which nothing needs to be there of but the compiler."""
  pytest.importorskip("jax_plugins.xla_cuda12", reason="NVIDIA's compiler is not installed (CONTRIBUTING.md says how)")
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform="cuda", topology_name="one", topology="1x1x1", target_config=H100
  ).devices[0]


def temporaries(device, function, *shapes):
  """Bytes beside arguments and results."""
  return compiled_for(device, function, *shapes).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("n, k, d", LARGE)
def test_gpu_search_writes_no_matrix(n, k, d, distance):
  device = gpu_device()
  shapes = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((k, d), jnp.float32)
  searches = [(lambda z, codes: nearest_code(z, codes, distance=distance), *shapes)]
  if d <= 32:
    lanes = jax.ShapeDtypeStruct((1, d, n), jnp.float32)
    searches.append((lambda z, codes: nearest_segments(z, codes, distance=distance), lanes, shapes[1]))
  for search in searches:
    assert temporaries(device, *search) < n * k * 4 / 20
  # Without blocks the compiler writes the whole matrix, which shows that the measurement sees it.
  assert temporaries(device, lambda z, codes: jnp.argmax(z @ codes.T, axis=1), *shapes) >= n * k * 4


@pytest.mark.slow
def test_gpu_step_writes_no_matrix():
  codes = 8192
  step, arguments = training_call(dataclasses.replace(SPEC, num_codes=(codes, codes)))
  assert temporaries(gpu_device(), step, *arguments) < SEGMENTS * codes * 4 / 4


@pytest.mark.slow
@pytest.mark.parametrize("n, k, d", LARGE)
def test_tpu_search_writes_no_matrix(n, k, d, monkeypatch):
  device = tpu_devices(monkeypatch)[0]
  codes = jax.ShapeDtypeStruct((k, d), jnp.float32)
  if d <= 32:
    compiled = compiled_for(device, nearest_segments, jax.ShapeDtypeStruct((1, d, n), jnp.float32), codes)
  else:
    compiled = compiled_for(device, nearest_code, jax.ShapeDtypeStruct((n, d), jnp.float32), codes)
  assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 50


@pytest.mark.slow
def test_tpu_step_holds_no_narrow_array(monkeypatch):
  _, (features, states) = training_call()
  step, _ = training_call()
  text = compiled_for(tpu_devices(monkeypatch)[0], step, features, states).as_text()
  # Logical shapes in an order of axes given by the layout: the first number in braces is the minor axis.
  minor = []
  for shape, layout in re.findall(r"f32\[([\d,]+)\]\{([\d,]+)", text):
    sizes = [int(n) for n in shape.split(",")]
    if sizes[int(layout.split(",")[0])] <= 16 and np.prod(sizes) >= SEGMENTS * 4:
      minor.append(shape)
  assert not minor
