"""Display strings: readable, one per token, never failing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sinklens.inputs.pieces import byte_alphabet, display_pieces, is_byte_level
from tests.inputs.tokenizers import byte_level, sentence_piece, word_piece

BYTES, UNIGRAM, WORDS = byte_level(adds_bos=True), sentence_piece(), word_piece()


def shown(tokenizer, text):
    return display_pieces(tokenizer, tokenizer(text)["input_ids"])


def test_byte_level_markers_are_decoded():
    assert "".join(shown(BYTES, "the quick\n\tfox <script>alert(1)</script>")) == (
        "<bos>the quick\n\tfox <script>alert(1)</script>"
    )
    assert shown(BYTES, "quick fox<|im_end|><eos>")[-2:] == ("<|im_end|>", "<eos>")


def test_part_of_a_character_shows_its_bytes():
    assert shown(BYTES, "█")[1:] == ("\\xe2", "\\x96", "\\x88")
    assert shown(BYTES, "é")[1:] == ("\\xc3", "\\xa9")


def test_sentence_piece():
    assert shown(UNIGRAM, "the fox") == (" the", " fox")
    assert shown(UNIGRAM, "the█") == (" the", "\\xe2", "\\x96", "\\x88")
    assert display_pieces(UNIGRAM, [1, 2, 3 + ord("<")]) == ("<s>", "</s>", "<")


def test_word_piece_is_left_alone():
    assert shown(WORDS, "the dog") == ("[CLS]", "the", "[UNK]", "[SEP]")
    assert shown(WORDS, "jumps") == ("[CLS]", "jump", "##s", "[SEP]")


def test_ids_outside_the_vocabulary():
    for tokenizer in (BYTES, UNIGRAM, WORDS):
        assert display_pieces(tokenizer, [10**6, 4])[0] == "<1000000>"
    assert display_pieces(None, [3, 10**6]) == ("3", "1000000")


@given(text=st.text(max_size=40), start=st.integers(0, 30))
def test_no_text_and_no_cut_fails(text, start):
    for tokenizer in (BYTES, UNIGRAM, WORDS):
        ids = tokenizer(text)["input_ids"][start:]
        pieces = display_pieces(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert all(pieces)


@given(data=st.binary(max_size=24))
def test_the_alphabet_is_that_of_the_library(data):
    """Against the tokenizers library: each byte's character is the token it makes of that byte."""
    from tokenizers import pre_tokenizers

    table = byte_alphabet()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    text = data.decode("utf-8", errors="ignore")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert bytes(table[char] for piece, _ in pieces for char in piece) == text.encode()


def test_what_counts_as_byte_level():
    assert [is_byte_level(t) for t in (BYTES, UNIGRAM, WORDS)] == [True, False, False]
