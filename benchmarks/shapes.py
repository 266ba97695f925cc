"""Whether the memory of every public shape is estimated, in time, with the weights that a hand sum gives.

    python benchmarks/shapes.py [--shapes FILE] [--only NAME ...] [--json benchmarks/results/shapes.json]

One process estimates a step of each base at its full size, in bfloat16 and in nf4: batch 1 x 512, checkpointing, rank
16 on all linear layers. Where the message of an error names what to exclude, what to leave whole, or the longest text,
that is asked next, and the row says so. With ``--only`` the other rows of the file stay as they were. The hand sum is
of the layers that transformers builds: two bytes a number, or for nf4 half a byte and a sixteenth for its statistics in
linear layers other than the head, and four bytes in the rest. Times are those of the processor; the first progress
line is timed by the clock.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from pytest_lora import estimate_memory

WHEEL = Path(__file__).parents[1] / "pytest_lora/bases/shapes.json"
BATCH, LENGTH, RANK = 1, 512, 16
IN_NF4 = 0.5 + 4 / 64  # half a byte, and a float32 for each block of 64
SHARE = 0.02


class Heard:
    """Notes when the first line is printed to where progress is."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.since = time.monotonic()
        self.after: float | None = None

    def write(self, text: str) -> int:
        if text.startswith("pytest-lora: estimating") and self.after is None:
            self.after = time.monotonic() - self.since
        return int(self._stream.write(text))

    def flush(self) -> None:
        self._stream.flush()


def built(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model of a class of transformers, without weights."""
    kind: Any = getattr(transformers, name)
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    model.tie_weights()
    return model


def summed(model: PreTrainedModel, left_whole: set[str], *, in_4_bits: bool) -> float:
    """Bytes of the parameters and buffers, by hand."""
    packed: set[int] = set()
    in_float32 = set(model._keep_in_fp32_modules or ())  # T5's second matrices, for one, which are not packed
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        kept = module is head or (left_whole | in_float32) & set(name.split("."))
        if in_4_bits and type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D) and not kept:
            packed.add(id(module.weight))
    total = 0.0
    for tensor in {id(p): p for p in model.parameters()}.values():
        each = IN_NF4 if id(tensor) in packed else 4 if in_4_bits else 2
        total += each * tensor.numel()
    return total


LONGER = re.compile(r"maximum allowed length of (\d+)")
"""What Whisper says of a text that is longer than it writes."""


def asked_next(message: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an error says to write, in place of what was asked; None where it says nothing new."""
    changed = dict(asked)
    for name in ("exclude_modules", "llm_int8_skip_modules"):
        if found := re.search(rf"{name}=(\[[^\]]*\])", message):
            changed[name] = sorted({*asked.get(name, ()), *ast.literal_eval(found[1])})
    if found := LONGER.search(message):
        changed["seq_len"] = int(found[1])
    return changed if changed != asked else None


def row(name: str, shape: dict[str, Any], *, in_4_bits: bool) -> dict[str, Any]:
    """One estimate, or what it says in place of one."""
    fields = dict(shape["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    asked: dict[str, Any] | None = {}
    answer: dict[str, Any] = {
        "base": name,
        "kind": config.model_type,
        "weights": "nf4" if in_4_bits else "bf16",
    }
    while asked is not None:
        heard, started = Heard(sys.stderr), time.process_time()
        sys.stderr, printed = heard, sys.stderr
        try:
            estimate = estimated(config, asked, in_4_bits=in_4_bits)
        except ValueError as error:
            answer |= {"error": str(error)}
            estimate = None
        finally:
            sys.stderr = printed
        answer["seconds"] = round(max(time.process_time() - started, answer.get("seconds", 0)), 2)
        if heard.after is not None:
            answer["first_line"] = round(heard.after, 1)
        if estimate is not None:
            answer.pop("error", None)
            by_hand = summed(
                built(config, estimate.architecture),
                set(asked.get("llm_int8_skip_modules", ())),
                in_4_bits=in_4_bits,
            )
            held = estimate.loaded - estimate.breakdown["adapters"]
            answer["kind"] = estimate.architecture
            return (
                answer | asked | {"peak": estimate.peak_allocated, "over_hand_sum": round(held / by_hand, 4)}
            )
        asked = asked_next(answer["error"], asked)
    return answer


def estimated(config: PretrainedConfig, asked: dict[str, Any], *, in_4_bits: bool) -> Any:
    adapter = LoraConfig(r=RANK, target_modules="all-linear", exclude_modules=asked.get("exclude_modules"))
    skip = asked.get("llm_int8_skip_modules")
    bits: Any = "nf4" if in_4_bits else None
    if in_4_bits and skip:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    return estimate_memory(
        adapter,
        config,
        batch_size=BATCH,
        seq_len=asked.get("seq_len", LENGTH),
        quantization=bits,
        gradient_checkpointing=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, default=WHEEL)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shapes = json.loads(options.shapes.read_text(encoding="utf-8"))
    path: Path | None = options.json
    before = (
        json.loads(path.read_text(encoding="utf-8"))["rows"] if path is not None and path.exists() else []
    )
    rows = {(one["base"], one["weights"]): one for one in before if options.only is not None}
    for name in shapes if options.only is None else options.only:
        for in_4_bits in (False, True):
            found = row(name, shapes[name], in_4_bits=in_4_bits)
            rows[name, found["weights"]] = found
            print(json.dumps(found), flush=True)
            if path is not None:
                path.write_text(json.dumps(summary([*rows.values()]), indent=1) + "\n", encoding="utf-8")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all rows come to, and the rows."""
    answered = [one for one in rows if "error" not in one]
    changes = {"exclude_modules", "llm_int8_skip_modules", "seq_len"}
    return {
        "asked": len(rows),
        "architectures": len({one["kind"] for one in rows}),
        "answered": len(answered),
        "answered_as_asked": sum(not changes & set(one) for one in answered),
        "within_2_percent": sum(abs(one["over_hand_sum"] - 1) <= SHARE for one in answered),
        "longest_seconds": max(one["seconds"] for one in rows),
        "first_line_after": max(one.get("first_line", 0.0) for one in rows),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "rows": rows,
    }


if __name__ == "__main__":
    main()
