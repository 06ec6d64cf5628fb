"""The language obeys its own rules, checked word by word rather than by the generator's arrays."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sinklens.testbeds.data import NAMES, TRIGGERS, InductionTask, QueryClass

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


def recalls(texts: list[list[str]]) -> list[bool]:
    """For every name with a past: whether what followed it last time follows again."""
    outcomes = []
    for text in texts:
        last: dict[str, str] = {}
        for word, following in pairwise(text[1:]):
            if word in NAMES:
                if word in last:
                    outcomes.append(following == last[word])
                last[word] = following
    return outcomes


def test_a_known_name_recalls_what_followed_it() -> None:
    certain = replace(TASK, recall=1.0)
    ids = certain.sample(31, 41, np.random.default_rng(3))
    outcomes = recalls([[TASK.vocabulary[token] for token in row] for row in ids])
    assert len(outcomes) > 200
    assert all(outcomes)
    # A free step can hit the same word by chance, so the share is a little above the recall.
    assert TASK.recall - 0.03 < np.mean(recalls(TEXTS)) < 1


def test_triggers_never_follow_each_other_and_no_free_step_repeats_a_word() -> None:
    assert not any(a in TRIGGERS and b in TRIGGERS for text in TEXTS for a, b in pairwise(text))
    assert np.all(np.diag(TASK.transition()) == 0)


def test_rows_of_the_chain_are_distributions_that_stay_in_their_topic() -> None:
    chain = TASK.transition()
    np.testing.assert_allclose(chain.sum(1), 1.0, atol=1e-12)
    topic = np.arange(TASK.ordinary) % TASK.topics
    same = topic[:, None] == topic[None, :]
    words = chain[: TASK.ordinary, : TASK.ordinary]
    np.testing.assert_allclose((words * same).sum(1), TASK.stay * (1 - TASK.trigger_rate), atol=1e-12)
    np.testing.assert_allclose(chain[: TASK.ordinary, TASK.ordinary :].sum(1), TASK.trigger_rate, atol=1e-12)


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
    # Word by word: after a trigger nothing is open, a known name recalls or not, the rest is the chain.
    chain, losses = TASK.transition(), []
    for row in IDS:
        last: dict[int, int] = {}
        for i, (current, following) in enumerate(pairwise(row.tolist())):
            if i == 0:
                chance = 1 / TASK.ordinary
            elif TASK.vocabulary[current] in TRIGGERS:
                chance = 1.0
            else:
                chance = chain[current, following]
                if current < TASK.keys and current in last:
                    chance = TASK.recall * (following == last[current]) + (1 - TASK.recall) * chance
            losses.append(-np.log(chance))
            last[current] = following
    assert TASK.floor(IDS) == pytest.approx(np.mean(losses), rel=1e-12)


def test_the_same_generator_state_gives_the_same_text() -> None:
    again = TASK.sample(53, 47, np.random.default_rng(11))
    other = TASK.sample(53, 47, np.random.default_rng(12))
    np.testing.assert_array_equal(IDS, again)
    assert (other != IDS).any()
