"""Each way a prompt file can be wrong has its own message."""

from __future__ import annotations

import pytest

from sinklens.core.errors import DataError, SinklensError, UsageError
from sinklens.inputs import load_prompts
from tests.inputs.tokenizers import byte_level

TOKENIZER = byte_level(adds_bos=True)


def refused(source, kind: type[SinklensError] = DataError, **options) -> str:
    with pytest.raises(kind) as caught:
        load_prompts(source, TOKENIZER, **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= 4
    assert caught.value.hint
    return text


CONTENTS = {
    "empty.txt": (b"", "is empty"),
    "empty.jsonl": (b"", "is empty"),
    "blank.txt": (b" \n\t\r\n\n", "all of it is blank"),
    "blank.jsonl": (b"\n \n", "all of it is blank"),
    "hollow.jsonl": (b'{"text": ""}\n{"text": ""}\n', "all of it is blank"),
    "latin.txt": ("der Fuchs\nüber".encode("latin1"), "not UTF-8: byte 0xfc at offset 10"),
    "wide.txt": ("fox".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": "b",}\n', "bad.jsonl:3 is not valid JSON"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl:2 is not valid JSON"),
    "list.jsonl": (b'["a", "b"]\n', "list.jsonl:1 is not a JSON object but list"),
    "other.jsonl": (b'{"text": "a"}\n{"txt": "b", "id": 3}\n', "other.jsonl:2 has no field 'text'"),
    "bare.jsonl": (b"{}\n", "fields found: none"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 12}\n', "number.jsonl:2: the field 'text' holds int"),
    "null.jsonl": (b'{"text": null}\n', "holds NoneType"),
    "words.jsonl": (b'{"text": ["a", "b"]}\n', "holds list"),
    "prompts.csv": (b"text\nfox\n", "has the extension '.csv'"),
    "prompts": (b"fox\n", "has the extension '(none)'"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_each_broken_file(name, tmp_path):
    content, expected = CONTENTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in refused(path)
    assert expected in refused(str(path))


def test_all_messages_differ(tmp_path):
    seen = set()
    for name, (content, _) in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
        seen.add(refused(tmp_path / name))
    assert len(seen) == len(CONTENTS)


def test_the_missing_field_names_the_fields_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "fox", "id": 3}\n')
    text = refused(f"{path}:contents")
    assert "has no field 'contents'; fields found: 'content', 'id'" in text
    assert "Did you mean 'content'?" in text
    assert load_prompts(f"{path}:content", TOKENIZER).prompts[0].source == "a.jsonl:1"


def test_missing_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("fox\n")
    assert "Did you mean 'prompts.txt'?" in refused(tmp_path / "promts.txt")
    assert "does not exist" in refused(tmp_path / "nowhere" / "a.jsonl")
    assert "does not exist" in refused(str(tmp_path / "none.jsonl:body"))
    assert "it is a folder" in refused(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder.txt")


def test_names_nobody_knows():
    assert "Did you mean 'prose'?" in refused("pros")
    assert "Unknown corpus 'maths'" in refused("corpus:maths")
    assert "Did you mean 'mathematics'?" in refused("corpus:maths")
    assert "Bundled corpora: mixed, prose, code, mathematics, dialogue" in refused("zzz")


def test_files_that_are_fine(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffthe fox\r\n\r\n  the\u2028dog\x0c\nlast".encode())
    found = load_prompts(path, TOKENIZER)
    texts = [TOKENIZER.decode(p.token_ids[1:]) for p in found.prompts]
    assert texts == ["the fox", "  the\u2028dog\x0c", "last"]
    assert [p.source for p in found.prompts] == ["a.txt:1", "a.txt:3", "a.txt:4"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "two\\nlines", "domain": "x"}\n\n{"text": "b", "domain": 3}\n')
    found = load_prompts(rows, TOKENIZER)
    assert [(p.source, p.domain) for p in found.prompts] == [("a.jsonl:1", "x"), ("a.jsonl:3", "")]
    assert found.description["domains"] == {"x": 1}


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [f'{{"text": "fox {i}", "body": "dog {i}", "n": {i}}}' for i in range(1100)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "test.jsonl").write_text('{"text": " ", "body": "last", "n": 1}\n')
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_hub_datasets(dataset):
    found = load_prompts(f"hf:{dataset}", TOKENIZER)
    assert len(found) == 1000
    assert found.description["source"] == "hf:set::train"
    assert found.description["warnings"] == ["Only the first 1000 rows of hf:set::train were considered."]
    assert [p.source for p in found.prompts][:2] == ["hf:set::train:0", "hf:set::train:1"]
    some = load_prompts(f"hf:{dataset}::test:body", TOKENIZER, n=1)
    assert "".join(some.prompts[0].pieces[1:]) == "last"
    assert some.description["warnings"] == []


def test_hub_refusals(dataset, monkeypatch):
    assert "no field 'txt'; fields found: 'text', 'body', 'n'" in refused(f"hf:{dataset}:::txt")
    assert "holds int" in refused(f"hf:{dataset}:::n")
    assert "has no split 'validation'" in refused(f"hf:{dataset}::validation")
    assert "has no configuration 'v2'" in refused(f"hf:{dataset}:v2")
    assert "has no text in its first 1 rows" in refused(f"hf:{dataset}::test")
    assert "not in the local cache" in refused("hf:nobody/nothing")
    assert "does not name a dataset" in refused("hf:", UsageError)
    assert "does not name a dataset" in refused("hf:a:b:c:d:e", UsageError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("Couldn't reach it"), "hub could not be reached"),
        (
            RuntimeError("Dataset 'x' doesn't exist on the Hub. More."),
            "cannot be read: Dataset 'x' doesn't exist",
        ),
    ],
)
def test_hub_when_online(monkeypatch, error, expected):
    def load(*args, **options):
        assert options["streaming"] is True
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert expected in refused("hf:nobody/nothing")


def test_hub_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'sinklens[datasets]'" in refused("hf:nobody/nothing")
