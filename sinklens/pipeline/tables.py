"""Results as rows that can be counted, walked through and turned into a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rows:
    """Rows of plain values; a subclass says of what, and in which units."""

    rows: list[dict[str, Any]]
    units: ClassVar[Mapping[str, str]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_frame(self) -> pd.DataFrame:
        """As a table; units are in `.attrs["units"]`."""
        import pandas as pd

        frame = pd.DataFrame([self._flat(row) for row in self.rows])
        frame.attrs["units"] = dict(self.units)
        return frame

    def _flat(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row without anything inside of anything."""
        return row
