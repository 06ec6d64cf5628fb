"""Errors, suggestions and the registry."""

from __future__ import annotations

import pytest

from sinklens.core import errors
from sinklens.core.errors import SinklensError, UsageError
from sinklens.core.registry import Registry
from sinklens.core.suggest import closest, did_you_mean


def test_messages_are_what_detail_hint():
    assert str(SinklensError("a", detail="b", hint="c")) == "a\nb\nc"
    assert str(SinklensError("a", hint="c")) == "a\nc"
    assert str(SinklensError("a")) == "a"


def test_exit_codes_are_those_of_the_manual():
    codes = {
        cls.__name__: cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, SinklensError)
    }
    assert codes == {
        "SinklensError": 1,
        "UsageError": 2,
        "ModelError": 3,
        "DataError": 3,
        "ResourceError": 4,
        "OutOfMemory": 4,
        "SelfCheckError": 5,
        "GateError": 6,
        "InterruptedRun": 130,
    }


def test_suggestions():
    known = ["primary-sinks", "secondary-sinks", "massive-activations"]
    assert closest("primary-sink", known)[0] == "primary-sinks"
    assert closest("MASSIVE", known) == ["massive-activations"]
    assert did_you_mean("zzz", known) is None
    assert did_you_mean("primry-sinks", known[:1]) == "Did you mean 'primary-sinks'?"


def test_registry():
    registry: Registry[type] = Registry("analyzer", "sinklens ls analyzers")

    @registry.register("one")
    class One:
        pass

    assert registry["one"] is One
    assert "one" in registry
    assert "two" not in registry
    assert list(registry) == ["one"]
    assert dict(registry.items()) == {"one": One}
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("one")(int)
    with pytest.raises(UsageError) as caught:
        registry["onee"]
    assert str(caught.value) == "Unknown analyzer 'onee'.\nDid you mean 'one'?\nSee: sinklens ls analyzers"
