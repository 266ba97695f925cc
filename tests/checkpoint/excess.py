"""Ways to ask too much with an adapter folder: patterns, lists, names and pickles, drawn at random."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
)
MAPS = {"rank_pattern": 8, "alpha_pattern": 16, "trainable_token_indices": [1]}
ATOMS = (
    *(
        "a",
        "aa",
        "q_proj",
        "model",
        r"\w",
        r"\.",
        ".",
        "[a-z]",
        r"\d",
        "(?:aa|a)",
        "(a|b|ab)",
        "[^x]",
        "(?i:é)",
    ),
    *(r"(\w+)\1", "(?=.*proj)", "(?<!x)", "$", "^", "|", "(?i)", "[\u0100-\uffff]", "x{65000}", "()", "[[a]"),
)
REPEATS = ("", "", "", "*", "+", "?", "*?", "{2,}", "{1,40}", "++", "{4294967295}")


def pattern(rng: random.Random, depth: int = 0) -> str:
    """A regular expression, or what looks like one: groups in groups, repeated, long alternatives, wide classes."""
    kind = rng.random()
    if depth < 4 and kind < 0.35:
        return f"({pattern(rng, depth + 1)}){rng.choice(REPEATS)}"
    if depth < 5 and kind < 0.42:
        return f"(?:{'|'.join(pattern(rng, 5) for _ in range(rng.randrange(2, 30)))}){rng.choice(REPEATS)}"
    if kind < 0.47:
        return rng.choice(ATOMS) * rng.choice((10, 40, 400))
    if kind < 0.49:
        first = rng.randrange(0x3000, 0x9000)
        return "(?i)" + "".join(f"[\u0100-\uffff{chr(first + n)}]" for n in range(rng.choice((3, 300, 3900))))
    return "".join(rng.choice(ATOMS) + rng.choice(REPEATS) for _ in range(rng.randrange(1, 9)))


def hostile_pattern(path: Path, rng: random.Random) -> None:
    """Patterns in one or two fields, in whatever form the field has."""
    config = json.loads((path / CONFIG).read_text())
    for field in rng.sample(FIELDS, rng.choice((1, 1, 2))):
        texts = [pattern(rng) for _ in range(rng.choice((1, 1, 3, 40)))]
        if field in MAPS:
            config[field] = dict.fromkeys(texts, MAPS[field])
        else:
            config[field] = texts[0] if rng.random() < 0.6 else texts
    _write(path, config)


def long_list(path: Path, rng: random.Random) -> None:
    """Thousands of names in one field: plain, alike, conflicting, or patterns."""
    config = json.loads((path / CONFIG).read_text())
    form = rng.choice(
        ("model.layers.{}.self_attn.q_proj", "x{}.q_proj", "q_proj{}", "{}" * 9, ".*{}", "(a{}|b)+")
    )
    count = rng.choice((100, 600, 2_000, 20_000, 45_000))
    for field in rng.sample(FIELDS, rng.choice((1, 1, 2))):
        names = [form.replace("{}", str(n)) for n in range(count)] + ["q_proj"]
        config[field] = dict.fromkeys(names, MAPS[field]) if field in MAPS else names
    _write(path, config)


def _write(path: Path, config: dict[str, Any]) -> None:
    (path / CONFIG).write_bytes(json.dumps(config, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def many_tensors(path: Path, rng: random.Random) -> None:
    """A header of thousands of tensors, under long, deep or strange names, alike or each of a shape of its own;
    their numbers are a hole."""
    count = rng.choice((500, 2_000, 8_000, 20_000, 20_000, 50_000))
    length = rng.choice((0, 0, 40, 100_000 // count))
    odd = rng.choice(("", "", "\x1b[31m", "\n::add-mask::x", "." * 40, "\ud800", "é" * 10))
    form = rng.choice(
        (
            "base_model.model.model.layers.{n}.self_attn.q_proj.lora_{p}.weight",
            "base_model.model.{n}.lora_{p}.weight",
            "base_model.model." + "a." * 50 + "{n}.lora_{p}.default.weight",
            "lora_unet_{n}.lora_{p}.weight",
            "{n}{p}",
        )
    )
    differ = rng.random() < 0.3
    header: dict[str, Any] = {}
    at = 0
    for n in range(count):
        name = f"{odd}{'x' * length}{form.format(n=n // 2, p='AB'[n % 2])}"
        shape = [8, 4] if n % 2 == 0 else [4, 8]
        if differ:
            shape[n % 2] = 1 + n
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    written = json.dumps(header).encode()
    with open(path / WEIGHTS, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + at)


def hostile_pickle(path: Path, rng: random.Random) -> None:
    """A pickle that stands for more than it holds, is packed, lies about its sizes, or goes on for ever."""
    (path / WEIGHTS).unlink()
    state: dict[str, Any] = {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "b": torch.ones(4)}
    kind = rng.choice(
        ("expanded", "packed", "large", "opcodes", "memo", "many", "damaged", "records", "bytes")
    )
    made = io.BytesIO()
    if kind == "expanded":
        state["c"] = torch.ones(1).expand(rng.choice((2**20, 2**31, 2**40)))
    if kind == "many":
        state.update({f"m{n}": state["b"] for n in range(rng.choice((1_000, 30_000)))})
    torch.save(state, made)
    content = bytearray(made.getvalue())
    if kind == "damaged":
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if kind in ("packed", "large", "opcodes", "memo", "records", "bytes"):
        data = {
            "packed": b"\0" * 50_000_000,
            "large": b"\0" * 9_000_000,
            "opcodes": b"](" + b"2" * rng.choice((1_000_000, 8_000_000)),
            "memo": b"\x80\x02]r" + rng.randbytes(4) + b".",
            "records": pickle.dumps({}, 2),
            "bytes": b"\x80\x05\x96" + rng.randbytes(8) + b".",
        }[kind]
        with zipfile.ZipFile(made := io.BytesIO(), "w", 8 if kind == "packed" else 0) as archive:
            archive.writestr("x/data.pkl", data)
            for n in range(rng.choice((10, 20_000)) if kind == "records" else 0):
                archive.writestr(zipfile.ZipInfo(f"x/data/{n}"), b"")
        content = bytearray(made.getvalue())
    (path / PICKLED).write_bytes(content)


def strange_names(path: Path, rng: random.Random) -> None:
    """Words that mean something to terminals and CI services, wherever a name may stand."""
    odd = (
        "\x1b[2J",
        "\n::add-mask::x",
        "\u202e",
        "##[error]y",
        "\r",
        "\x00",
        "\ud800",
        "]]>",
        "x" * 50_000,
    )
    config = json.loads((path / CONFIG).read_text())
    for field in (
        *FIELDS,
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "init_lora_weights",
        "bias",
        "r",
    ):
        if rng.random() < 0.3:
            word = rng.choice(odd)
            config[field] = rng.choice((word, [word, "q_proj"], {word: 8}, f"q_proj{word}"))
    config[rng.choice(odd)] = rng.choice(odd)
    _write(path, config)
    for _ in range(rng.choice((0, 1, 500))):
        name = f"{rng.choice(odd[:6])}{rng.random()}".replace("/", "").replace("\0", "")[:200]
        (path / name).touch()


EXCESSES: tuple[Callable[[Path, random.Random], None], ...] = (
    hostile_pattern,
    hostile_pattern,
    long_list,
    many_tensors,
    hostile_pickle,
    strange_names,
)
