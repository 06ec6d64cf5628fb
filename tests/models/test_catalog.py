"""Names of models: aliases, revisions, bundled checkpoints, folders, and what is said about unknown names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sinklens.core.errors import ModelError, UsageError
from sinklens.models.catalog import aliases, bundled, default_model, list_models, locate


def test_aliases_are_lower_case_and_lead_to_the_hub() -> None:
    assert aliases()["qwen3-30b-a3b"].target == "Qwen/Qwen3-30B-A3B"
    for name, entry in aliases().items():
        assert name == name.lower()
        assert "/" not in name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.target)
        assert entry.about


def test_alias_with_revision() -> None:
    source = locate("qwen3-30b-a3b@abc123")
    assert (source.id, source.location, source.revision) == (
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B",
        "abc123",
    )
    assert source.alias == "qwen3-30b-a3b"
    assert locate("Pythia-70m", "step1000").revision == "step1000"
    assert locate("gpt2").revision is None


def test_hub_id_with_revision() -> None:
    source = locate("some-org/some.model@v1.0")
    assert (source.id, source.revision, source.folder, source.alias) == (
        "some-org/some.model",
        "v1.0",
        None,
        None,
    )
    assert locate("a/b", "x") == locate("a/b@x") == locate("a/b@x", "x")
    with pytest.raises(UsageError, match="Two revisions"):
        locate("a/b@x", "y")


def test_bundled_checkpoints_and_the_default() -> None:
    assert bundled()
    for name in bundled():
        source = locate(f"bundled:{name}")
        assert source.id == f"bundled:{name}"
        assert source.folder == bundled()[name]
        assert locate(name).id == source.id
    assert locate(None).id == default_model()
    assert locate(None).folder in bundled().values()


def test_listing_has_bundled_first_and_says_what_each_is() -> None:
    entries = list_models()
    count = len(bundled())
    assert all(entry.name.startswith("bundled:") for entry in entries[:count])
    assert [entry.name for entry in entries[count:]] == list(aliases())
    assert all(entry.about for entry in entries[count:])


def test_folders_as_text_and_as_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my.ckpt"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for spec in (str(folder), folder):
        assert locate(spec).folder == folder
    monkeypatch.chdir(tmp_path)
    assert locate("my.ckpt").folder == Path("my.ckpt")
    assert locate("./my.ckpt").id == "./my.ckpt"
    with pytest.raises(UsageError, match="has no revisions"):
        locate("./my.ckpt", "main")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen3-30b", "Did you mean 'qwen3-30b-a3b'"),
        ("qwen3-30b-a3", "Did you mean 'qwen3-30b-a3b'"),
        ("lama-3.1-8b", "'llama-3.1-8b'"),
        ("gpt-2", "'gpt2'"),
        ("zzzzqqqq", "no alias, no folder and no org/name"),
        ("bundled:dense-in", "Did you mean 'dense-ind'"),
        ("a/b/c", "no alias, no folder and no org/name"),
        ("./not-here", "There is no folder './not-here'"),
        ("~/not-here", "There is no folder '~/not-here'"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        locate(name)
    assert says in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) <= 4


def test_a_folder_without_config_under_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'weights' exists but has no config\.json"):
        locate("weights")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file, not a model folder") as caught:
        locate(tmp_path / "model.safetensors")
    assert str(tmp_path) in str(caught.value.hint)
