"""`--stream` of commands that cannot stream: it is known, so that it is refused with a reason."""

from __future__ import annotations

from typing import Annotated

import typer


def _refused(value: str | None) -> str | None:
    if value is not None:
        from sinklens.pipeline.options import ProfileOptions
        from sinklens.pipeline.streamed_blocks import refuse_in_memory

        refuse_in_memory(ProfileOptions(stream=value))
    return value


Unstreamed = Annotated[str | None, typer.Option("--stream", hidden=True, callback=_refused)]
