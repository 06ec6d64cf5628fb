"""Prompts from a dataset of the hub (or a local folder that the `datasets` library can read)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from sinklens.core.errors import DataError, UsageError

from .files import parse_row
from .sources import Document, Source

POOL_FACTOR = 20
MIN_POOL = 1000


def read_hub(spec: str, *, n: int | None) -> Source:
    """Documents of `dataset[:config[:split[:field]]]`; parts may be empty, as in `wikitext::test`.

    Only the first rows are read, `max(1000, 20 n)` of them: hub datasets may be larger than the disk. Online
    they are streamed; offline they come from the local cache. Both give the same rows in the same order.
    """
    name, config, split, field = _parts(spec)
    rows = _load(name, config, split)
    limit = max(MIN_POOL, POOL_FACTOR * (n or 0))
    label = Path(name).name if Path(name).is_absolute() else name
    called = f"hf:{label}:{config or ''}:{split}"
    documents = [
        parse_row(row, field, f"{called}:{i}") for i, row in enumerate(islice(_rows(rows, spec), limit))
    ]
    filled = [document for document in documents if _not_blank(document)]
    if not filled:
        raise DataError(
            f"The dataset {label!r} has no text in its first {len(documents)} rows.",
            hint=f"Name another split or field: hf:{label}:{config or ''}:{split}:FIELD",
        )
    notes = () if len(documents) < limit else (f"Only the first {limit} rows of {called} were considered.",)
    return Source(called if field == "text" else f"{called}:{field}", filled, notes=notes)


def _not_blank(document: Document) -> bool:
    return bool(document.content.strip() if isinstance(document.content, str) else document.content)


def _parts(spec: str) -> tuple[str, str | None, str, str]:
    name, config, split, field, *rest = [*spec.split(":"), "", "", ""]
    if not name or any(rest):
        raise UsageError(
            f"'hf:{spec}' does not name a dataset.",
            detail="Expected hf:dataset[:config[:split[:field]]].",
            hint="For instance: hf:Salesforce/wikitext:wikitext-2-raw-v1:test:text",
        )
    return name, config or None, split or "train", field or "text"


INSTEAD = "use a file, or the bundled corpus: --prompts mixed"
"""What helps without a network; tasks have other words."""


def _load(name: str, config: str | None, split: str, *, instead: str = INSTEAD) -> Any:
    try:
        import datasets
        from datasets.config import HF_HUB_OFFLINE
    except ImportError as err:
        raise DataError(
            "Reading hub datasets needs the 'datasets' library, which is not installed.",
            hint="pip install 'sinklens[datasets]'",
        ) from err
    # Streaming cannot use the cache, so without the network the rows come from what an earlier run
    # downloaded.
    offline = HF_HUB_OFFLINE and not Path(name).exists()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=not offline)
    except Exception as err:
        raise _explained(err, name, config, split, offline, instead) from err


def _explained(
    err: Exception, name: str, config: str | None, split: str, offline: bool, instead: str = INSTEAD
) -> DataError:
    """One message per cause; `datasets` tells most of them apart by text only."""
    text = " ".join(str(err).split())
    first = text.split(". ")[0][:200]
    label = Path(name).name if Path(name).is_absolute() else name
    if "split" in text.lower() and split in text:
        return DataError(
            f"The dataset {label!r} has no split {split!r}.",
            detail=first,
            hint=f"hf:{label}:{config or ''}:SPLIT",
        )
    if "BuilderConfig" in text or "onfig name is missing" in text:
        what = f"has no configuration {config!r}" if config else "has several configurations"
        return DataError(
            f"The dataset {label!r} {what}.", detail=text[:300], hint=f"hf:{label}:CONFIG:{split}"
        )
    if offline:
        return DataError(
            f"The dataset {label!r} is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub.",
            hint=f"Leave --offline out and unset HF_HUB_OFFLINE, or {instead}",
        )
    if isinstance(err, ConnectionError) or "onnection" in type(err).__name__ or "resolve host" in text:
        return DataError(
            f"The hub could not be reached for the dataset {label!r}.",
            hint=f"Check the network, or {instead}",
        )
    return DataError(
        f"The dataset {label!r} cannot be read: {first}.",
        hint="Check its name and access on the hub; private datasets need HF_TOKEN.",
    )


def _rows(rows: Any, spec: str) -> Any:
    """The rows, with a broken stream reported as an error of the data."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as err:
            raise DataError(
                f"Reading 'hf:{spec}' stopped: {' '.join(str(err).split())[:200]}",
                hint="Try again, or save the texts to a .jsonl file and use that.",
            ) from err
        yield row
