"""Models of the Hugging Face hub: from the cache, from a hub on the loopback interface, and without network."""

import builtins
import socket
import time

import numpy as np
import pytest

import codebind_jax
from codebind_jax.saving import hub
from tests import family_fixtures
from tests.hub_server import COMMIT, Hub

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and no network."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "cache"


@pytest.fixture
def server(cache, monkeypatch):
  """A hub that answers, with an empty cache."""
  served = Hub()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "ENDPOINT", served.url)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
  monkeypatch.setenv("HF_TOKEN", "hf_test")
  yield served
  served.close()


def cached(cache, repo="openai/clip-tiny", revision=COMMIT):
  """CLIP in the cache, as huggingface_hub keeps it."""
  folder = cache / f"models--{repo.replace('/', '--')}"
  family_fixtures.unpack("clip_hf", folder / "snapshots" / revision)
  (folder / "refs").mkdir(exist_ok=True)
  (folder / "refs" / "main").write_text(revision)
  return folder


def test_a_model_of_the_cache_loads_without_network(cache):
  folder = cached(cache)
  (folder / "refs" / "v1").write_text(COMMIT)
  want = codebind_jax.load(folder / "snapshots" / COMMIT).embed({"text": ["a dog"]})["text"].shared
  for source in ("hf:openai/clip-tiny", "hf:openai/clip-tiny@v1", f"hf:openai/clip-tiny@{COMMIT}"):
    np.testing.assert_array_equal(codebind_jax.load(source).embed({"text": ["a dog"]})["text"].shared, want)
  # A reference to it goes through the hub's name, so that it holds on another machine.
  saved = codebind_jax.load("hf:openai/clip-tiny").save(cache.parent / "saved", trunks="reference")
  assert f"hf:openai/clip-tiny@{COMMIT}" in (saved / "README.md").read_text()
  assert str(cache) not in (saved / "config.json").read_text()
  np.testing.assert_array_equal(codebind_jax.load(saved).embed({"text": ["a dog"]})["text"].shared, want)


@pytest.mark.parametrize("source", ["hf:openai", "hf:openai/clip/x", "hf:", "hf:../x@y", "hf:a/b@"])
def test_other_forms_of_names_are_refused(source):
  with pytest.raises(ValueError, match="allowed is hf:org/name or hf:org/name@revision"):
    codebind_jax.load(source)


def test_without_network_or_cache_the_error_is_clear_and_comes_in_seconds(cache, monkeypatch):
  with pytest.raises(ValueError, match="hf:openai/clip-tiny: not in the cache of huggingface_hub, and the hub cannot"):
    codebind_jax.load("hf:openai/clip-tiny")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  with socket.socket() as silent:  # takes connections and never answers
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached"):
      codebind_jax.load("hf:openai/clip-tiny")
    cached(cache)
    assert codebind_jax.load("hf:openai/clip-tiny", modalities=["text"]).modalities == ("text",)
  assert time.monotonic() - began < 10


def test_only_what_is_needed_is_downloaded(server, tmp_path):
  folder = family_fixtures.unpack("clip_hf", tmp_path / "source")
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/config.json", "README.md")
  server.models["openai/clip-tiny"] = files | dict.fromkeys(others, b"no")
  model = codebind_jax.load("hf:openai/clip-tiny")
  want = codebind_jax.load(folder).embed({"text": ["a dog"]})["text"].shared
  np.testing.assert_array_equal(model.embed({"text": ["a dog"]})["text"].shared, want)
  asked = {path.rsplit("/", 1)[-1] for path in server.requests if "/resolve/" in path}
  assert asked == {name for name in files if not name.endswith(".npz")}
  with pytest.raises(ValueError, match="hf:openai/other: the hub has no such model or revision"):
    codebind_jax.load("hf:openai/other")


def test_a_pushed_model_is_loaded_again(server, tmp_path):
  model = codebind_jax.load(family_fixtures.unpack("clip_hf", tmp_path / "clip"))
  address = model.push_to_hub("me/bound", private=True)
  assert address.startswith(f"{server.url}/me/bound") and server.private == {"me/bound": True}
  files = server.models["me/bound"]
  assert {"README.md", "config.json", "model.safetensors", "trunks/text/tokenizer.json"} <= set(files)
  assert b'codebind_jax.load("hf:me/bound")' in files["README.md"]
  again = codebind_jax.load("hf:me/bound")
  np.testing.assert_array_equal(again.embed({"text": ["a dog"]})["text"].shared,
                                model.embed({"text": ["a dog"]})["text"].shared)  # fmt: skip
  with pytest.raises(ValueError, match="name: got 'a/b/c'; allowed is org/name"):
    model.push_to_hub("a/b/c")


def test_without_huggingface_hub_the_error_says_how_to_install_it(tmp_path, monkeypatch):
  real = builtins.__import__
  lacking = lambda name, *rest: real(name if name != "huggingface_hub" else "no_such_module", *rest)
  monkeypatch.setattr(builtins, "__import__", lacking)
  with pytest.raises(ValueError, match=r"install it with pip install 'codebind_jax\[hub\]'"):
    codebind_jax.load("hf:openai/clip-tiny")


def test_of_several_forms_of_weights_one_is_needed():
  small = ["config.json", "tokenizer.json", "merges.txt"]
  assert hub.needed([*small, "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"]) == [
    *small, "model.safetensors"]  # fmt: skip
  shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  assert hub.needed(["model.safetensors.index.json", *shards, "a.bin"]) == ["model.safetensors.index.json", *shards]
  assert hub.needed(["open_clip_config.json", "open_clip_pytorch_model.bin", "x/config.json"]) == [
    "open_clip_config.json", "open_clip_pytorch_model.bin"]  # fmt: skip
  assert hub.needed(["config.json", "trunks/image/config.json", "model.safetensors"]) == [
    "config.json", "trunks/image/config.json", "model.safetensors"]  # fmt: skip
