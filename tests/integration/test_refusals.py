"""What cannot be profiled is refused in words."""

from __future__ import annotations

import pytest

import sinklens
from sinklens.core.errors import ModelError

from ..families import build


@pytest.mark.parametrize("name", ["vit", "clip", "siglip_vision"])
def test_a_model_that_needs_pictures_is_refused_before_anything_is_run(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be run on text alone") as refused:
        sinklens.profile(build(name), prompts=[[1, 2, 3, 4] * 16])
    assert "pixel_values" in str(refused.value)
