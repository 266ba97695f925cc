"""Options that become fields of ``LoraConfig`` or ``Expect`` for every test of a session."""

from __future__ import annotations

import ast
from typing import Any, get_args

import pytest

from pytest_lora.expect import Expect, Serve
from pytest_lora.values import shown


def session_fields(config: pytest.Config) -> dict[str, object]:
    """The fields that ini ``lora_config`` sets, and those of ``--lora-serve``.

    Raises:
        pytest.UsageError: A line is not ``field = literal``, or there is no such server.
    """
    return dict(_field(line) for line in config.getini("lora_config")) | _serve(config)


def _field(line: str) -> tuple[str, object]:
    name, equals, literal = (part.strip() for part in line.partition("="))
    try:
        if not equals or not name.isidentifier():
            raise ValueError
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise pytest.UsageError(
            f"ini lora_config: {shown(line)} is not FIELD = PYTHON LITERAL, as in r = 16 or "
            "target_modules = ['q_proj']"
        ) from error


def _serve(config: pytest.Config) -> dict[str, object]:
    flag, ini = config.getoption("lora_serve"), config.getini("lora_serve")
    given = flag or ini
    if not given:
        return {}
    server, colon, limit = given.strip().partition(":")
    fields: dict[str, Any] = {"serve": server}
    try:
        if colon:
            fields["max_lora_rank"] = int(limit)
        Expect(**fields)
    except ValueError as error:
        source = "--lora-serve" if flag else "ini lora_serve"
        raise pytest.UsageError(
            f"{source}: {shown(given)} is no server; write one of {', '.join(get_args(Serve))}, "
            "with its rank limit as in vllm:16"
        ) from error
    return fields
