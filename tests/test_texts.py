"""Texts as people have them: names of marks, nothing left, unknown words, halves of characters, and very long ones."""

import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers

from codebind_jax.data import reading
from codebind_jax.data.preparation.texts import HashedWords, Ids, clip_ids, without_punctuation
from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.data.transforms.text import Tokenize
from codebind_jax.trunks import minilm

MARKS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


def letters(length=40):
  return Tokenize(minilm.letter_tokenizer(), length)


def wordpiece():
  """A tokenizer whose marks are special tokens, as BERT's, and that splits at blanks alone."""
  vocabulary = {word: i for i, word in enumerate([*MARKS, "a", "cow", "[", "]", "pad", "##", "violin", "##]", "##PAD"])}
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(list(MARKS))
  marks = [("[CLS]", 2), ("[SEP]", 1)]
  marks = [(name, vocabulary[name]) for name, _ in marks]
  made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
  return made


def unigram():
  pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "abcdps<>/ ")]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False))
  made.add_special_tokens(["<unk>", "<pad>", "</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
  return made


def test_names_of_marks_are_text():
  tokenize = letters()
  for mark in MARKS:
    ids = tokenize(f"{mark} a")
    words = ids[1 : list(ids).index(3)]
    assert ids[0] == 2 and 0 not in words and 2 not in words and len(words) > 2, mark
  for made, texts, special in ((wordpiece(), ["[PAD] a cow", "[CLS]", "a [SEP] cow"], {0, 1, 2}),
                               (unigram(), ["<pad> ab", "a</s>b", "<pad><pad>"], {1, 2})):  # fmt: skip
    for ids in (Ids(made, 24, 0), pickle.loads(pickle.dumps(Ids(made, 24, 0))), Tokenize(made, 24)):
      for text in texts:
        found = ids(text)
        there = found[: np.flatnonzero(found)[-1] + 1].tolist()
        inside = there[1:-1] if isinstance(made.model, tokenizers.models.WordPiece) else there[:-1]
        assert inside and special.isdisjoint(inside), (text, there)
      made = ids.tokenizer  # the next one begins with what this one left
  np.testing.assert_array_equal(Ids(unigram(), 9, 1)("ab"), [3, 4, 2, 1, 1, 1, 1, 1, 1])


def test_a_batchs_texts_do_not_depend_on_each_other():
  """Padding inside a text would end it where another text is longer, see `trim_to_bucket`."""
  tokenize = letters(64)
  long, text = tokenize("word " * 12), tokenize("[PAD] [PAD] a cow")
  assert (text != 0).sum() == np.flatnonzero(text)[-1] + 1
  alone = text_transforms.trim_to_bucket([text])
  np.testing.assert_array_equal(text_transforms.trim_to_bucket([text, long])[0][: alone.shape[1]], alone[0])


def test_clips_marks_are_marks_as_in_its_release_and_it_is_said(caplog):
  ids = clip_ids()
  assert list(ids("a <|endoftext|> b")).count(49407) == 2
  assert "text with a mark of the tokenizer" in caplog.text
  caplog.clear()
  assert list(ids("a dog")).count(49407) == 1 and not caplog.messages


@pytest.mark.parametrize("text", ["\u200b", "\x00\x01", "\ufeff", "\u200b \u200b"])
def test_nothing_left_after_normalisation_is_refused(text):
  for ids in (letters(), Ids(minilm.letter_tokenizer(), 8, 0)):
    with pytest.raises(ValueError, match="text: nothing is left of"):
      ids(text)
  with pytest.raises(ValueError, match="text: nothing is left of '!!! ...' after cleaning"):
    Ids(minilm.letter_tokenizer(), 8, 0, clean=without_punctuation)("!!! ...")


def test_control_characters_are_nothing():
  np.testing.assert_array_equal(letters()("a\x00 co\x07w"), letters()("a cow"))


def test_composed_and_decomposed_characters_are_one(caplog):
  composed = "café naïve Ångström 한국"
  assert (apart := unicodedata.normalize("NFD", composed)) != composed
  pieces = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(0xD7FF)}, []))
  for ids in (letters(), clip_ids(), Ids(pieces, 40, 0)):
    np.testing.assert_array_equal(ids(apart), ids(composed))


@pytest.mark.parametrize("text", ["\ud83d", "a cow \udc04 and more", "\udc04\ud83d"])
def test_half_of_a_surrogate_pair_is_named(text):
  for ids in (letters(), clip_ids(), HashedWords(8)):
    with pytest.raises(ValueError, match=r"text: has half of a surrogate pair at character \d, in"):
      ids(text)
  assert letters()("a \U0001f404")[0] == 2


def test_unknown_words_alone_are_said_once(caplog):
  tokenize = letters()
  for _ in range(2):
    tokenize("漢字 漢")
  assert caplog.messages == ["text of words that the tokenizer does not know: 漢字 漢"]
  tokenize("漢字 a")
  assert len(caplog.messages) == 1
  Ids(unigram(), 9, 1)("xyz")
  assert len(caplog.messages) == 2


def test_cuts_are_said_once(caplog):
  for ids in (letters(6), Ids(minilm.letter_tokenizer(), 6, 0)):
    for _ in range(2):
      found = ids("abcde fgh")
    assert found[-1] == 3 and found[0] == 2
    assert caplog.messages == ["text of 10 tokens cut to 6: abcde fgh..."]
    caplog.clear()
    reading._made.clear()


def test_very_long_texts_are_cut_before_they_are_tokenised(monkeypatch, caplog):
  seen, whole = [], text_transforms.Encoder._parts
  monkeypatch.setattr(text_transforms.Encoder, "_parts", lambda self, text: seen.append(len(text)) or whole(self, text))
  for ids in (letters(8), Ids(minilm.letter_tokenizer(), 8, 0), clip_ids(8)):
    text = " " * 1_000_000 + "a cow " * 1_500_000
    np.testing.assert_array_equal(ids(text), ids("a cow " * 20))
    assert max(seen) <= 8000
  assert "text of 10,000,000 characters: its first 8,000 are read" in caplog.text


@pytest.mark.parametrize("value", [3, None, b"a", ["a"]])
def test_what_is_no_text_is_refused_everywhere(value):
  for ids in (letters(), clip_ids(), HashedWords(8)):
    with pytest.raises(ValueError, match="text: got .* is needed"):
      ids(value)
