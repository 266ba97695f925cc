"""What the configuration of a model says of tokens and positions: the special ones, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.inspection.behaviour.texts import text_config
from pytest_lora.inspection.transformers_internals import reads_both_ways


class Vocabulary(NamedTuple):
    """Special tokens and sizes that a model's configuration states.

    ``stops`` are the tokens at which ``generate`` ends, ``opens`` is the begin token of a base that cannot do without
    it, ``positions`` the length that rotary positions were trained for and are not rescaled beyond.
    """

    task: str | None
    rows: int | None
    outputs: int | None
    classes: int | None
    pad: int | None
    begin: int | None
    decoder_start: int | None
    ends: tuple[int, ...]
    single_label: bool
    both_ways: bool
    stops: tuple[int, ...]
    opens: int | None
    positions: int | None


def vocabulary(root: nn.Module, base: BaseFacts) -> Vocabulary:
    """Read the configuration of a base."""
    config: Any = getattr(root, "config", None)
    pad = getattr(config, "pad_token_id", None)
    begin = getattr(config, "bos_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    get = getattr(root, "get_output_embeddings", lambda: None)
    try:
        head = get()
    except (NotImplementedError, AttributeError):
        head = None
    # A head that PEFT ties to an embedding in modules_to_save states its two sizes the wrong way round in the copy.
    outputs = getattr(getattr(head, "original_module", head), "out_features", None) or base.vocab_size
    classes = getattr(config, "num_labels", None)
    problem = getattr(config, "problem_type", None)
    return Vocabulary(
        task=base.task_type,
        rows=base.vocab_size,
        outputs=outputs,
        classes=classes if isinstance(classes, int) else None,
        pad=pad if isinstance(pad, int) else None,
        begin=begin if isinstance(begin, int) else None,
        decoder_start=start if isinstance(start, int) else None,
        ends=_ends(config),
        # With one output and nothing said, transformers takes the labels for numbers.
        single_label=problem == "single_label_classification" or (problem is None and classes != 1),
        both_ways=reads_both_ways(config),
        stops=tuple(dict.fromkeys((*_ends(config), *_ends(getattr(root, "generation_config", None))))),
        opens=begin if isinstance(begin, int) and _NEEDS_BEGIN.fullmatch(_family(root)) else None,
        positions=_rotary_positions(root),
    )


_NEEDS_BEGIN = re.compile(r"gemma\d*n?(_text)?")
"""Families whose bases give nonsense without a begin token. Of Gemma, Google's model cards and its tokenizers say so
(https://unsloth.ai/blog/gemma-bugs measured it); T5Gemma and others that merely have the name are none of them."""


def _family(root: nn.Module) -> str:
    return str(getattr(text_config(root), "model_type", ""))


def _ends(config: Any) -> tuple[int, ...]:
    end = getattr(config, "eos_token_id", None)
    return tuple(int(e) for e in (end if isinstance(end, (list, tuple)) else () if end is None else (end,)))


def _rotary_positions(root: nn.Module) -> int | None:
    """Positions of a model whose rotary embedding goes on beyond them without a word; None for any other.

    Learned positions raise there, and those that a configuration rescales ("linear", "dynamic", "yarn") are meant to go
    further.
    """
    config: Any = text_config(root)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, Mapping) else {}
    # Models whose layers look near or far have one for each kind of layer.
    each = [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
    kinds = {r.get("rope_type", r.get("type", "default")) for r in each}
    rotates = any(type(module).__name__.endswith("RotaryEmbedding") for module in root.modules())
    positions = getattr(config, "max_position_embeddings", None)
    return positions if rotates and kinds <= {"default", None} and isinstance(positions, int) else None
