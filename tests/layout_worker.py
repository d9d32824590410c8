"""Ten training steps in every layout of eight devices, and on one; see test_sharding.py."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from codebind_jax import config as config_lib
from codebind_jax.compositional import new_codebooks
from codebind_jax.models.transformer import BlockSpec, Transformer
from codebind_jax.runtime import optim
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.compile import compile_step
from codebind_jax.runtime.sharding import make_layout
from codebind_jax.step import make_train_step
from tests.codebook_worker import collectives
from tests.train_fixtures import tiny_config

LAYOUTS = {"8x1x1": "", "1x8x1": "fsdp", "2x2x2": "", "1x1x8": "tensor"}  # and what the codes are split over
ROWS, STEPS = 16, 10
SHAPES = {"image": (ROWS, 3, 32), "text": (ROWS, 1, 32)}


def config_of(name, **overrides):
  """The tiny config on one mesh."""
  mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(int, name.split("x"))))
  sizes = {"batch_size": ROWS, "steps": STEPS, "model.towers.image.hidden": 0, "stages.bridges.mixup": 0.0}
  return tiny_config(pathlib.Path("none"), pathlib.Path("none"), **(sizes | mesh | overrides))


def batches():
  """Ten batches as numpy; each row's text is like its image, some rows lack one."""
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    common = rng.normal(size=(ROWS, 1, 32))
    content = {m: (common + rng.normal(size=shape)).astype(np.float32) for m, shape in SHAPES.items()}
    yield {"toy": content | {"_mask": {m: rng.random(ROWS) < 0.9 for m in SHAPES}}}


def train(config, devices):
  """The layout, the state after ten steps, and what the devices tell each other in one."""
  config = config_lib.read(config)
  layout = make_layout(config.mesh, config.sharding, devices)
  method, stage = config_lib.method_of(config), config.ordered[0]
  model, spec = method.model, method.spec

  def init(rng):
    dummy = {name: jnp.zeros((1, *shape[1:])) for name, shape in SHAPES.items()}
    return model.init(rng, dummy)["params"], new_codebooks(rng, spec, SHAPES) if spec else {}, {}

  state = state_lib.create(layout, jax.random.key(0), init)
  tx, _ = optim.make_optimizer(state.params, stage.train, config.optim, stage.steps)
  state = state_lib.with_optimizer(state, tx, layout)
  compiled = None
  for batch in batches():
    batch = layout.put_batch(batch)
    compiled = compiled or compile_step(make_train_step(method, stage, tx), state, batch, layout)
    state, _ = compiled(state, batch)
  return layout, state, collectives(compiled.as_text())


def whole(layout, state):
  """Parameters and codebooks as numpy by path."""
  kept = layout.gathered({"params": state.params, "codebooks": state.codebooks})
  return {path: np.asarray(leaf) for path, leaf in optim.param_paths(kept).items()}


def splits(state):
  """Path -> how many devices hold a part of their own of a leaf."""
  return {
    path: len({str(shard.index) for shard in leaf.addressable_shards})
    for path, leaf in optim.param_paths(state).items() if path != "rng"
  }


def trunk_collectives(scan):
  """What devices tell each other in a step through a frozen trunk whose weights are split over `fsdp`."""
  config = config_lib.read(config_of("2x4x1"))
  layout = make_layout(config.mesh, config.sharding, jax.devices())
  trunk = Transformer(2, BlockSpec(4), remat=True, scan=scan)
  x = jax.ShapeDtypeStruct((ROWS, 6, 32), jnp.float32, sharding=layout.rows)
  params = jax.eval_shape(trunk.init, jax.random.key(0), x)["params"]
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  params = jax.tree.map(place, params, layout.of(params, "params/image/trunk"))
  scale = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=layout.replicated)
  loss = lambda scale, params, x: jnp.sum(jnp.sin(trunk.apply({"params": params}, scale * x)))
  with jax.set_mesh(layout.mesh):
    return collectives(jax.jit(jax.value_and_grad(loss)).lower(scale, params, x).compile().as_text())


def main(folder):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)
  # A program with a ring that XLA's CPU client reads back from the cache waits for itself (jax 0.10.2).
  jax.config.update("jax_enable_compilation_cache", False)
  found = {}
  for name, codes in LAYOUTS.items():
    layout, state, _ = train(config_of(name, **{"sharding.codes": codes}), jax.devices())
    np.savez(folder / f"{name}.npz", **whole(layout, state))
    found[name] = {"splits": splits(state), "table": layout.table(state)}
  tiles = lambda chunk, **more: train(config_of("8x1x1", **{"stages.bridges.chunk": chunk}, **more), jax.devices())
  np.savez(folder / "8x1x1 in tiles.npz", **whole(*tiles(2)[:2]))
  baseline = {"model.quantize": False, "stages.bridges.losses": ConfigDict({"info_nce": 1.0})}
  contrast = {"codebook.shared_codes": 512, "stages.bridges.code_rows": 2}
  found["similarity"] = train(config_of("8x1x1", **contrast), jax.devices())[2]
  found["baseline"] = {chunk: tiles(chunk, **baseline)[2] for chunk in (0, 2)}
  found["trunk"] = {str(scan): trunk_collectives(scan) for scan in (False, True)}
  (folder / "found.json").write_text(json.dumps(found))
  np.savez(folder / "one.npz", **whole(*train(config_of("1x1x1"), jax.devices()[:1])[:2]))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
