"""Selection, truncation, packing and the description."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklens.core.errors import DataError, UsageError
from sinklens.inputs import load_prompts
from sinklens.inputs.load import interleave, separator
from tests.inputs.tokenizers import CHAT, byte_level, word_piece

LINES = [f"{'the fox jumps ' * (1 + i % 5)}{i}" for i in range(23)]


def test_all_prompts_in_order():
    tokenizer = byte_level(adds_bos=True)
    found = load_prompts(LINES, tokenizer)
    assert [list(p.token_ids) for p in found.prompts] == tokenizer(LINES)["input_ids"]
    assert [p.index for p in found.prompts] == list(range(23))
    assert [p.source for p in found.prompts] == [f"memory#{i}" for i in range(23)]
    assert all(len(p.pieces) == len(p.token_ids) for p in found.prompts)
    assert found.prompts[3].pieces[0] == "<bos>"
    assert "".join(found.prompts[3].pieces[1:]) == LINES[3]


def test_sample_depends_on_the_seed_only_and_keeps_the_order():
    tokenizer = byte_level()
    draws = {seed: load_prompts(LINES, tokenizer, n=7, seed=seed) for seed in range(4)}
    again = load_prompts(LINES, tokenizer, n=7, seed=2)
    assert again == draws[2]
    picked = {seed: [int(p.source[7:]) for p in draw.prompts] for seed, draw in draws.items()}
    assert all(len(set(places)) == 7 and places == sorted(places) for places in picked.values())
    assert len({tuple(places) for places in picked.values()}) == 4
    assert [p.index for p in draws[0].prompts] == list(range(7))


def test_the_global_generator_is_not_touched():
    import random

    random.seed(5)
    expected = random.Random(5).random()
    load_prompts(LINES, byte_level(), n=3)
    assert random.random() == expected


def test_more_asked_than_there_are():
    found = load_prompts(LINES, byte_level(adds_bos=True), n=50)
    assert len(found) == 23
    assert found.description["warnings"] == ["Asked for 50 prompts, but the source has only 23."]


def test_truncation_and_short_prompts_are_counted():
    tokenizer = byte_level(adds_bos=True)
    lengths = [len(ids) for ids in tokenizer(LINES)["input_ids"]]
    seq_len, least = sorted(lengths)[-4], sorted(lengths)[6]
    found = load_prompts(LINES, tokenizer, seq_len=seq_len, min_tokens=least)
    text = found.description
    assert text["truncated"] == sum(n > seq_len for n in lengths) > 0
    assert text["dropped_short"] == sum(n < least for n in lengths) > 0
    assert [len(p) for p in found.prompts] == [min(n, seq_len) for n in lengths if n >= least]
    assert f"{text['dropped_short']} of 23 prompts were dropped" in text["warnings"][0]


def test_a_sample_skips_prompts_that_are_too_short():
    texts = ["a", "the quick brown fox jumps over the lazy dog"] * 9
    found = load_prompts(texts, byte_level(), n=5, min_tokens=8)
    assert len(found) == 5
    assert all(len(p) >= 8 for p in found.prompts)


def test_all_too_short():
    with pytest.raises(DataError) as caught:
        load_prompts(["ab", "abcd", "a"], byte_level(adds_bos=True), min_tokens=64)
    assert str(caught.value).splitlines()[:2] == [
        "All 3 prompts of memory are shorter than 64 tokens.",
        "The longest has 5 tokens.",
    ]
    assert "--min-tokens 5" in str(caught.value)


def test_empty_prompts_are_not_prompts():
    with pytest.raises(DataError, match="All 2 prompts of memory are empty"):
        load_prompts(["", ""], byte_level(adds_bos=True))
    assert load_prompts(["", "fox"], byte_level(adds_bos=True)).description["dropped_short"] == 1


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"seq_len": -1}, {"min_tokens": 0}, {"n": 2.5}, {"n": True}, {"pack": True}]
)
def test_bad_numbers(options):
    with pytest.raises(UsageError):
        load_prompts(LINES, byte_level(), **options)


def test_min_tokens_above_seq_len():
    with pytest.raises(UsageError, match="No prompt can have 9 tokens"):
        load_prompts(LINES, byte_level(), seq_len=8, min_tokens=9)


@pytest.mark.parametrize(
    "source",
    [[[5, 6, 7], [8, 9]], [torch.tensor([5, 6, 7]), torch.tensor([8, 9])], [np.array([5, 6, 7]), (8, 9)]],
)
def test_token_ids_from_memory(source):
    found = load_prompts(source, None)
    assert [p.token_ids for p in found.prompts] == [(5, 6, 7), (8, 9)]
    assert found.prompts[0].pieces == ("5", "6", "7")
    assert found.description["tokenizer"] is None


@pytest.mark.parametrize(
    "source", [[3, 4], [[True, False]], [[-1, 2]], [[1.5]], [[]], [None], [[[1, 2]]], [{"role": "user"}]]
)
def test_lists_that_are_no_prompts(source):
    with pytest.raises(DataError, match="Prompt 0 of the list cannot be used"):
        load_prompts(source, byte_level())


def test_other_refusals_of_memory():
    with pytest.raises(DataError, match="mixes text and token ids"):
        load_prompts(["fox", [1, 2]], byte_level())
    with pytest.raises(DataError, match="list of prompts is empty"):
        load_prompts([], byte_level())
    with pytest.raises(DataError, match="came without a tokenizer"):
        load_prompts(["fox"], None)
    with pytest.raises(UsageError, match="object of type int"):
        load_prompts(42, byte_level())


@given(
    seq_len=st.integers(5, 31),
    n=st.none() | st.integers(1, 9),
    bos=st.sampled_from(["auto", "on", "off"]),
    kind=st.sampled_from(["llama", "gpt2", "qwen", "bert"]),
)
def test_packing_gives_the_joined_stream(seq_len, n, bos, kind):
    tokenizer = PACK_TOKENIZERS[kind]
    if kind == "qwen" and bos == "on":
        bos = "auto"
    found = load_prompts(LINES, tokenizer, pack=True, seq_len=seq_len, n=n, bos=bos)
    windows = [list(p.token_ids) for p in found.prompts]
    assert {len(window) for window in windows} == {seq_len}
    assert n is None or len(windows) <= n
    first = {"llama": bos != "off", "gpt2": bos == "on", "qwen": False, "bert": bos != "off"}[kind]
    start = tokenizer.cls_token_id if kind == "bert" else tokenizer.bos_token_id
    last = kind == "bert"
    assert all((window[0] == start) == first for window in windows)
    inner = [window[first : len(window) - last] for window in windows]
    if n is None:
        split = tokenizer.sep_token_id if kind == "bert" else tokenizer.eos_token_id
        stream: list[int] = []
        for line in LINES:
            stream += ([split] if stream else []) + tokenizer(line, add_special_tokens=False)["input_ids"]
        width = seq_len - first - last
        assert [token_id for window in inner for token_id in window] == stream[
            : len(stream) - len(stream) % width
        ]
        assert found.description["leftover_tokens"] == len(stream) % width
    assert found.description["packed"] is True


PACK_TOKENIZERS = {
    "llama": byte_level(adds_bos=True),
    "gpt2": byte_level(),
    "qwen": byte_level(bos=False),
    "bert": word_piece(),
}


def test_packing_names_its_documents_and_domains(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "the fox", "domain": "a"}\n{"text": "the dog over", "domain": "b"}\n')
    tokenizer = byte_level(bos=False)
    found = load_prompts(path, tokenizer, pack=True, seq_len=len(tokenizer("the fox")["input_ids"]))
    assert found.prompts[0].source == "two.jsonl:1"
    assert found.prompts[0].domain == "a"
    whole = load_prompts(path, tokenizer, pack=True, seq_len=found.description["n_tokens"])
    assert (whole.prompts[0].source, whole.prompts[0].domain) == ("two.jsonl:1 … two.jsonl:2", "")


def test_packing_without_enough_text():
    with pytest.raises(DataError, match="less than one window of 4096"):
        load_prompts(LINES, byte_level(), pack=True, seq_len=4096)


def test_separator_without_any_end_token():
    class Bare:
        eos_token_id = sep_token_id = None
        bos_token_id: int | None = 4

    class Holder:
        tokenizer = Bare()

    assert separator(Holder()) == (4,)  # pyright: ignore[reportArgumentType]
    Holder.tokenizer.bos_token_id = None
    assert separator(Holder()) == ()  # pyright: ignore[reportArgumentType]


def test_description():
    tokenizer = byte_level(adds_bos=True, template=CHAT)
    found = load_prompts(LINES, tokenizer, n=5, seq_len=9, seed=3, chat_template=True)
    text = found.description
    assert text["n_prompts"] == 5
    assert text["n_tokens"] == sum(len(p) for p in found.prompts)
    assert text["first_tokens"] == {"<|im_start|>": 5}
    assert text["bos_added"] is False
    assert text["chat_template"] is True
    assert text["tokenizer"]["size"] == len(tokenizer)
    assert text["source"] == "memory"
    assert (text["seq_len"], text["seed"], text["bos"], text["packed"]) == (9, 3, "auto", False)
    assert load_prompts(LINES, tokenizer).description["bos_added"] is True


def test_the_hash_is_of_the_tokens(tmp_path):
    tokenizer = byte_level()
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    hashes = [load_prompts(source, tokenizer).description["sha256"] for source in (LINES, path, LINES[1:])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_folder_is_not_named_in_the_description(tmp_path):
    byte_level().save_pretrained(tmp_path / "tok")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    path = tmp_path / "lines.txt"
    path.write_text("the fox\n")
    text = load_prompts(path, tokenizer).description
    assert text["tokenizer"]["name"] == "tok"
    assert str(tmp_path) not in repr(load_prompts(path, tokenizer))


@given(lengths=st.lists(st.integers(0, 5), max_size=5))
def test_interleaving_serves_all_queues_in_turn(lengths):
    queues = [[(rank, number) for rank in range(n)] for number, n in enumerate(lengths)]
    assert list(interleave(map(iter, queues))) == sorted(item for queue in queues for item in queue)


def test_mixed_corpus_is_even_over_its_domains():
    tokenizer = byte_level(adds_bos=True)
    for n in (4, 12, 32):
        found = load_prompts("mixed", tokenizer, n=n, seq_len=64, min_tokens=64)
        assert set(Counter(p.domain for p in found.prompts).values()) == {n // 4}
        assert {len(p) for p in found.prompts} == {64}
    assert load_prompts(None, tokenizer, n=4) == load_prompts("corpus:mixed", tokenizer, n=4)
    assert load_prompts(None, tokenizer, n=9, seed=1) != load_prompts(None, tokenizer, n=9, seed=2)
