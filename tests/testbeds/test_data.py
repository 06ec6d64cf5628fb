"""The language obeys its own rules, checked word by word rather than by the generator's arrays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sinklens.testbeds.data import NAMES, NOUNS, TRIGGERS, InductionTask, QueryClass

TASK = InductionTask()
IDS = TASK.sample(53, 47, np.random.default_rng(11))
TEXTS = [[TASK.vocabulary[token] for token in row] for row in IDS]


def test_every_sequence_starts_with_bos_and_never_shows_it_again() -> None:
    assert all(text[0] == "<s>" for text in TEXTS)
    assert not any(word in ("<s>", "<unk>", "<pad>") for text in TEXTS for word in text[1:])


def test_a_trigger_brings_back_the_word_before_it() -> None:
    copies = [
        (text[i + 1], text[i - 1]) for text in TEXTS for i in range(2, len(text) - 1) if text[i] in TRIGGERS
    ]
    assert len(copies) > 100
    assert all(after == before for after, before in copies)


def test_a_known_name_is_followed_by_its_last_noun() -> None:
    recalls = 0
    for text in TEXTS:
        last: dict[str, str] = {}
        for word, following in pairwise(text[1:]):
            if word in NAMES:
                assert following in NOUNS
                if word in last:
                    assert following == last[word]
                    recalls += 1
                last[word] = following
    assert recalls > 200


def test_triggers_follow_nouns_only() -> None:
    before = {text[i - 1] for text in TEXTS for i in range(2, len(text)) if text[i] in TRIGGERS}
    assert before <= set(NOUNS)


def test_rows_of_the_chain_are_distributions_that_stay_in_their_topic() -> None:
    chain = TASK.transition()
    np.testing.assert_allclose(chain.sum(1), 1.0, atol=1e-12)
    topic = np.arange(TASK.ordinary) % TASK.topics
    same = topic[:, None] == topic[None, :]
    names = chain[: TASK.keys, : TASK.ordinary]
    np.testing.assert_allclose((names * same[: TASK.keys]).sum(1), TASK.stay, atol=1e-12)
    nouns = chain[TASK.keys : TASK.ordinary]
    np.testing.assert_allclose(nouns[:, TASK.ordinary :].sum(1), TASK.trigger_rate, atol=1e-12)
    np.testing.assert_allclose(
        nouns[:, : TASK.keys].sum(1), (1 - TASK.trigger_rate) * TASK.name_rate, atol=1e-12
    )


def test_classes_say_what_the_context_allows() -> None:
    classes = TASK.classify(IDS)
    for text, row in zip(TEXTS, classes, strict=True):
        seen: set[str] = set()
        for word, found in zip(text, row, strict=True):
            expected = QueryClass.PLAIN
            if word == "<s>":
                expected = QueryClass.BOS
            elif word in TRIGGERS:
                expected = QueryClass.TRIGGER
            elif word in NAMES:
                expected = QueryClass.KEY_SEEN if word in seen else QueryClass.KEY_FIRST
            assert found == expected
            seen.add(word)


def test_the_floor_is_the_loss_of_a_reader_who_knows_the_language() -> None:
    # Word by word: certain steps cost nothing, free ones their log probability.
    chain, total, count = TASK.transition(), 0.0, 0
    for row, text in zip(IDS, TEXTS, strict=True):
        seen: set[str] = set()
        for i in range(len(row) - 1):
            certain = text[i] in TRIGGERS or (text[i] in NAMES and text[i] in seen)
            if i == 0:
                total += np.log(TASK.ordinary)
            elif not certain:
                total -= np.log(chain[row[i], row[i + 1]])
            seen.add(text[i])
            count += 1
    assert TASK.floor(IDS) == pytest.approx(total / count, rel=1e-12)


def test_the_same_generator_state_gives_the_same_text() -> None:
    again = TASK.sample(53, 47, np.random.default_rng(11))
    other = TASK.sample(53, 47, np.random.default_rng(12))
    np.testing.assert_array_equal(IDS, again)
    assert (other != IDS).any()
