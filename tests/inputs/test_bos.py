"""What stands at position 0 under each policy, for each kind of tokenizer."""

from __future__ import annotations

import pytest

from sinklens.core.errors import DataError, UsageError
from sinklens.inputs import load_prompts
from tests.inputs.tokenizers import CHAT, byte_level, word_piece

TEXT = "the quick brown fox"
BOS_CHAT = "<bos>" + CHAT


def ids(tokenizer, text: object = TEXT, **options):
    return list(load_prompts([text], tokenizer, **options).prompts[0].token_ids)


def plain(tokenizer, text=TEXT):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [TEXT, "<bos>" + TEXT, "<bos><bos>" + TEXT, "<bos> " + TEXT, "über 🦊"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_policies(text, adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos)
    bare = text.replace("<bos>", "")
    assert ids(tokenizer, text) == tokenizer(text)["input_ids"]
    assert ids(tokenizer, text, bos="on") == [tokenizer.bos_token_id, *plain(tokenizer, bare)]
    assert ids(tokenizer, text, bos="off") == plain(tokenizer, bare)


def test_on_refuses_a_tokenizer_without_bos():
    with pytest.raises(DataError, match="this tokenizer has none"):
        ids(byte_level(bos=False), bos="on")


def test_unknown_policy():
    with pytest.raises(UsageError, match="'maybe'"):
        ids(byte_level(), bos="maybe")


def test_word_piece_keeps_its_suffix_when_cut():
    tokenizer = word_piece()
    text = "the quick brown fox jumps over the quick brown fox"
    for bos, first in (("auto", [2]), ("on", [2]), ("off", [])):
        assert ids(tokenizer, text, bos=bos) == [*first, *plain(tokenizer, text), 3]
        cut = ids(tokenizer, text, bos=bos, seq_len=7)
        assert cut == [*first, *plain(tokenizer, text)[: 6 - len(first)], 3]


def test_seq_len_must_leave_room_for_text():
    with pytest.raises(UsageError, match="special tokens of a prompt alone are 2"):
        ids(word_piece(), seq_len=2)


@pytest.mark.parametrize("template", [CHAT, BOS_CHAT])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_chat_template(template, adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos, template=template)
    rendered = f"<|im_start|>user\n{TEXT}<|im_end|>\n"
    inner, bos = plain(tokenizer, rendered), [tokenizer.bos_token_id]
    own = bos if template == BOS_CHAT else []
    assert ids(tokenizer, chat_template=True) == own + inner
    assert ids(tokenizer, chat_template=True, bos="on") == bos + inner
    assert ids(tokenizer, chat_template=True, bos="off") == inner


def test_messages_need_and_use_the_template():
    messages = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog"}]
    tokenizer = byte_level(template=CHAT)
    expected = plain(tokenizer, "<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\ndog<|im_end|>\n")
    assert ids(tokenizer, messages, chat_template=True) == expected
    with pytest.raises(DataError, match="only through a chat template"):
        ids(tokenizer, messages)


def test_template_that_refuses_and_template_that_is_not_there():
    strict = byte_level(template="{{ raise_exception('system role is not supported') }}")
    with pytest.raises(DataError, match="refused memory#0: system role is not supported"):
        ids(strict, chat_template=True)
    with pytest.raises(DataError, match="has no chat template"):
        ids(byte_level(), chat_template=True)


@pytest.mark.parametrize(
    ("tokenizer", "options", "expected"),
    [
        (byte_level(adds_bos=True), {}, None),
        (byte_level(), {"bos": "on"}, None),
        (byte_level(), {"bos": "off"}, None),
        (byte_level(), {}, "has a BOS token but adds none"),
        (byte_level(bos=False), {}, "has no BOS token, so position 0"),
        (byte_level(adds_bos=True, template=CHAT), {"chat_template": True}, "chat template gives no BOS"),
        (byte_level(adds_bos=True, template=BOS_CHAT), {"chat_template": True}, None),
        (byte_level(adds_bos=True, template=CHAT), {}, "chat template that was not applied"),
    ],
)
def test_warnings(tokenizer, options, expected):
    warnings = load_prompts([TEXT, TEXT + " jumps"], tokenizer, **options).description["warnings"]
    assert len(warnings) == bool(expected)
    assert expected is None or expected in warnings[0]


def test_two_bos_are_noticed():
    tokenizer = byte_level(adds_bos=True)
    warnings = load_prompts(["<bos>" + TEXT, TEXT, TEXT], tokenizer).description["warnings"]
    assert [w[:48] for w in warnings] == ["1 of 3 prompts start with two BOS tokens; --bos "]


def test_given_ids_are_left_alone():
    tokenizer = byte_level(adds_bos=True)
    bos = tokenizer.bos_token_id
    assert ids(tokenizer, [7, 8, 9]) == [7, 8, 9]
    assert ids(tokenizer, [7, 8, 9], bos="on") == [bos, 7, 8, 9]
    assert ids(tokenizer, [bos, 7, 8, 9], bos="on") == [bos, 7, 8, 9]
    assert ids(tokenizer, [bos, bos, 7], bos="off") == [7]
    assert ids(None, [7, 8, 9], seq_len=2) == [7, 8]
    with pytest.raises(UsageError, match="not to token ids"):
        ids(byte_level(template=CHAT), [7, 8], chat_template=True)
    with pytest.raises(DataError, match="A BOS needs a tokenizer"):
        ids(None, [7, 8], bos="on")
