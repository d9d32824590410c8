"""The benchmark of the specific part, on drawn vectors of which it is known what they hold."""

import numpy as np
import pytest

from benchmarks import specific_part
from codebind_jax.norm import unit


def test_two_embeddings_beside_each_other():
  found = specific_part.beside(np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[0.0, 1.0], [1.0, 0.0]]))
  np.testing.assert_allclose(found, np.array([[1, 0, 0, 1], [0.6, 0.8, 1, 0]]) / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("seeds", [1, 2])
def test_probes_find_the_field_where_it_is_and_take_the_next_seeds_baseline(seeds):
  rng = np.random.default_rng(0)

  def model(shared, specific):
    """Columns of training and unseen rows whose parts hold the family (1) or noise (0)."""
    sides = []
    for rows, concepts in ((240, range(20)), (120, range(20, 30))):
      family = np.arange(rows) % 3
      label = np.array([f"kind{one}" for one in np.array(concepts)[np.arange(rows) // 3 % len(concepts)]])
      holds = lambda what, family=family: np.asarray(
        unit(what * 9 * np.eye(4)[family] + rng.normal(size=(len(family), 4))), np.float32
      )
      columns = {"shared": holds(shared), "specific": holds(specific)}
      columns["full"] = specific_part.beside(columns["shared"], columns["specific"])
      sides.append(columns | {"family": np.array([f"f{one}" for one in family]), "label": label,
                              "_content": np.arange(rows)})  # fmt: skip
    sides[1]["family"][:6] = "f9"  # that no training row has: these rows are not asked for
    return sides

  ours = [model(0, 1) for _ in range(seeds)]
  # The second seed's baseline alone knows the family: beside the first's it is the second head.
  plain = [model(0, 0), model(1, 0)][:seeds]
  found = specific_part.told(ours, plain, "image", "family", "label")
  if seeds == 1:  # rows of known concepts are refused where the set's concepts are new, and taken where they are not
    for known in ours + plain:
      known[1]["label"] = known[0]["label"][: len(known[1]["label"])]
    with pytest.raises(ValueError, match="in training and test"):
      specific_part.told(ours, plain, "image", "family", "label")
    assert specific_part.told(ours, plain, "image", "family", None).keys() == found.keys()
  assert all(len(values) == seeds for values in found.values())
  first = {name: values[0] for name, values in found.items()}
  assert min(first["specific"], first["full"]) > 95
  assert max(first["shared"], first["baseline"], first["random projection"]) < 60
  assert first["baseline and random projection"] < 60
  assert ("baseline and second head" in first) == (seeds == 2)
  if seeds == 2:
    assert first["baseline and second head"] > 95 and found["baseline"][1] > 95
