"""``@pytest.mark.lora``: merged from module, class and test, and split into LoraConfig and Expect fields."""

from __future__ import annotations

import difflib
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_lora.expect import Expect
from pytest_lora.plugin.session_options import options_of
from pytest_lora.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

OF_CHECKS = ("select", "ignore", "strict")
"""Fields of the mark ``lora`` that hold for every check of a test."""

_MEANT = {
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "ratio": "alpha_ratio",
}


class Fields(NamedTuple):
    """Fields as they were given, by where they belong."""

    config: dict[str, object]
    expect: dict[str, object]


def fields_for(node: pytest.Item) -> Fields:
    """What ini and marks say for a test; the closest wins.

    Raises:
        ValueError: A field does not exist, or a mark has a positional argument.
    """
    merged = dict(options_of(node.config).fields)
    split(merged, f"{_source(node)}, in lora_config")
    for mark in farthest_first(node, "lora"):
        if mark.args:
            raise ValueError(_positional(node.nodeid, mark.args[0]))
        merged |= {name: value for name, value in mark.kwargs.items() if name not in OF_CHECKS}
    return split(merged, f"{node.nodeid}: @pytest.mark.lora")


def expect_for(node: pytest.Item) -> Expect:
    """The Expect that ini and marks describe.

    Raises:
        ValueError: A field does not exist or has a value that it cannot have.
    """
    fields: dict[str, Any] = fields_for(node).expect
    try:
        return Expect(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.nodeid}: @pytest.mark.lora: {error}") from error


def split(fields: Mapping[str, object], where: str) -> Fields:
    """Tell LoraConfig fields from Expect fields by their names.

    PEFT is imported only if there is a field that is not of Expect.

    Raises:
        ValueError: A field is neither.
    """
    own = set(Expect.field_names())
    split = Fields({}, {})
    for name, value in fields.items():
        if name in own:
            split.expect[name] = value
        elif name in lora_config_fields():
            split.config[name] = value
        else:
            raise ValueError(
                f"{where} has no field {shown(name)}; did you mean {_closest(str(name)[:40])!r}?"
            )
    return split


@cache
def lora_config_fields() -> tuple[str, ...]:
    """Names of the fields that the installed PEFT's LoraConfig takes."""
    from peft import LoraConfig

    return tuple(inspect.signature(LoraConfig).parameters)


def farthest_first(node: pytest.Item, name: str) -> Iterator[pytest.Mark]:
    """The marks of a name from the module to the parameter set, so that the closest comes last.

    pytest lists base classes before subclasses, but of stacked decorators the closest one first.
    """
    for owner in node.listchain():
        marks = [mark for mark in owner.own_markers if mark.name == name]
        of_parameters = list(getattr(getattr(owner, "callspec", None), "marks", ()))
        stacked = [mark for mark in marks if mark not in of_parameters]
        yield from stacked if isinstance(owner, pytest.Class) else reversed(stacked)
        yield from (mark for mark in marks if mark in of_parameters)


def _closest(name: str) -> str:
    known = [*lora_config_fields(), *Expect.field_names(), *OF_CHECKS]
    return _MEANT.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _positional(nodeid: str, value: object) -> str:
    names = {int: "r", float: "alpha_ratio", str: "target_modules", list: "target_modules"}
    name = names.get(type(value), "config")
    return (
        f"{nodeid}: @pytest.mark.lora takes fields by name, not the positional argument {value!r}; "
        f"did you mean {name}={value!r}?"
    )


def _source(node: pytest.Item) -> str:
    path = node.config.inipath
    return path.name if path else "ini"
