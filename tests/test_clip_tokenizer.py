"""CLIP's byte pair encoding against ImageBind's and open_clip's own tokenizers."""

import gzip
import pathlib
from importlib import resources

import numpy as np
import pytest

from codebind_jax.data.preparation.texts import clean, clip_ids, clip_tokenizer, text_input

FOLDER = pathlib.Path(__file__).parent
MARKS = {"golden/imagebind_text.npz": {},
         "fixtures/clip_tokenizer.npz": {"start": "<start_of_text>", "end": "<end_of_text>"}}  # fmt: skip


@pytest.mark.parametrize("name", MARKS)
def test_ids_equal_those_of_the_releases(name):
  with np.load(FOLDER / name) as file:
    texts, wanted = bytes(file["utf8"]).decode().split("\0"), file["ids"]
  ids = clip_ids(**MARKS[name])
  assert len(texts) == len(wanted) >= 30
  for text, want in zip(texts, wanted):
    np.testing.assert_array_equal(ids(text), want, err_msg=repr(text))


def test_long_texts_are_cut_and_keep_their_end_mark():
  ids = clip_ids()("word " * 200)
  assert ids.shape == (77,) and ids.dtype == np.int32 and ids[-1] == 49407 and ids.argmax() == 76
  assert list(clip_ids(length=4)("a dog barking")) == [49406, 320, 1929, 49407]
  assert not clip_ids()("a dog")[4:].any()  # padding is 0, not the end mark


def test_cleaning_mends_and_lowers():
  assert clean("  The “DOG’s”\n\n &amp;lt;b&amp;gt; ﬁne ") == "the \"dog's\" <b> fine"


def test_the_merges_are_those_in_use():
  merges = gzip.decompress(resources.files("codebind_jax.data.preparation").joinpath("clip_merges.txt.gz").read_bytes())
  lines = merges.decode().splitlines()
  assert len(lines) == len(set(lines)) == 48894 and lines[0] == "i n"
  assert clip_tokenizer().get_vocab_size() == 49408


def test_the_revision_names_vocabulary_and_cleaning():
  revision = text_input(clip_ids()).revision
  assert "clip_tokenizer.clean" in revision and "<|endoftext|>" in revision
