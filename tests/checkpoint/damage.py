"""Ways to damage an adapter folder at random; the test suite and ``benchmarks/checkpoint_fuzz.py`` both use them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.checkpoint.excess import EXCESSES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Damage = Callable[[Path, random.Random], None]

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "8",
    "x" * 10_000,
    "\ud800",
    "\x00",
    "../../etc/passwd",
    "(a+)+$",
    "(.|.)*x",
    "((((.*)*)*)*)*$",
    ".*" * 40 + "x",
    "x{4294967295}",
    "(" * 500,
    "[",
    [],
    [[]],
    [None],
    [0],
    ["q_proj"],
    ["q_proj"] * 2000,
    {},
    {"q_proj": 8},
    {"": 0},
    {"(a+)+$": 8},
    {"q_proj": "8"},
    {"auto_map": {"AutoModel": "modeling.Evil"}},
)

FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "bias",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "task_type",
    "peft_type",
    "base_model_name_or_path",
    "auto_mapping",
    "auto_map",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "megatron_core",
    "layer_replication",
    "fan_in_fan_out",
    "loftq_config",
    "eva_config",
    "lora_bias",
)

PICKLE = b"cos\nsystem\n(S'touch EXECUTED'\ntR."


def _file(rng: random.Random) -> str:
    return rng.choice((CONFIG, WEIGHTS))


def flip_bytes(path: Path, rng: random.Random) -> None:
    """Change some bytes, mostly near the start, where the headers are."""
    file = path / _file(rng)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        end = len(content) if rng.random() < 0.3 else min(len(content), 2000)
        content[rng.randrange(end)] = rng.randrange(256)
    file.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Leave a part of a file."""
    file = path / _file(rng)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def splice(path: Path, rng: random.Random) -> None:
    """Take a part out, put one in twice, or put garbage in."""
    file = path / _file(rng)
    content = file.read_bytes()
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 4, 100, 1000)))
    garbage = rng.randbytes(rng.choice((0, 1, 8, 500)))
    part = rng.choice((b"", content[start:end] * 2, garbage))
    file.write_bytes(content[:start] + part + content[end:])


def lie_about_the_length(path: Path, rng: random.Random) -> None:
    """Claim another size of the header, up to exabytes."""
    file = path / WEIGHTS
    content = file.read_bytes()
    length = rng.choice((0, 1, 2, 100, len(content), 100_000_000, 2**40, 2**62, 2**63, 2**64 - 1))
    file.write_bytes(length.to_bytes(8, "little") + content[8:])


def edit_header(path: Path, rng: random.Random) -> None:
    """Change the header as JSON: sizes, offsets, dtypes, names, other kinds of values."""
    file = path / WEIGHTS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(header))
        entry = header[name]
        field = rng.choice(("dtype", "shape", "data_offsets", "name", "entry", "numbers"))
        if field == "name":
            header[rng.choice(("", "\ud800", "x" * 100_000, "a." * 500, "lora_A", name.upper()))] = (
                header.pop(name)
            )
        elif field == "entry" or not isinstance(entry, dict):
            header[name] = rng.choice(ODD_VALUES)
        elif field == "numbers":
            numbers = entry.get(rng.choice(("shape", "data_offsets")))
            if isinstance(numbers, list) and numbers:
                numbers[rng.randrange(len(numbers))] = rng.choice((0, 1, -1, 7, 2**62, 2**64, 0.5, True))
        elif field == "dtype":
            entry["dtype"] = rng.choice(
                ("F8_E5M2", "F4", "I8", "BOOL", "C64", "f32", "", None, 3, "F16", "BF16")
            )
        else:
            entry[field] = rng.choice(
                ([], [0], [0, 0], [2**63, 2**63], [8, 64], "8x64", None, [[8]], [1] * 5000)
            )
    _write_header(file, json.dumps(header).encode("utf-8", "surrogatepass"), content[8 + length :])


def strange_header(path: Path, rng: random.Random) -> None:
    """Put something else in the place of the header: deep, wide, doubled or not JSON."""
    file = path / WEIGHTS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    body = content[8 + length :]
    header = content[8 : 8 + length].rstrip()
    first = b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    made = rng.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"{" + b",".join(b'"%d":{}' % n for n in range(20_000)) + b"}",
            b"{" + b",".join(b'"a":0' for _ in range(20_000)) + b"}",
            header[:-1] + b"," + header[1:],
            b'{"a":' + first + b',"a":' + first + b"}",
            b"[]",
            b"null",
            b"1" * 10_000,
            header.decode().encode("utf-16"),
            b"\xff\xfe" + header,
            b"\xef\xbb\xbf" + header,
            b"",
            b"{}",
        )
    )
    _write_header(file, made, body)


def _write_header(file: Path, header: bytes, body: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def edit_config(path: Path, rng: random.Random) -> None:
    """Set some fields of the configuration to values of every kind."""
    file = path / CONFIG
    config = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        config[rng.choice(FIELDS)] = rng.choice(ODD_VALUES)
    file.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


def strange_config(path: Path, rng: random.Random) -> None:
    """Put something else in the place of the configuration."""
    text = (path / CONFIG).read_text()
    made = rng.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"",
            b"null",
            b"[1, 2]",
            b'"LORA"',
            b"9" * 5000,
            text.encode("utf-16"),
            text.encode("utf-8-sig"),
            b"\x80\x04" + text.encode(),
            text.rstrip().encode()[:-1] + b', "r": 16}',
            b'{"peft_type": "LORA", "target_modules": [' + b'"a",' * 200_000 + b'"b"]}',
            b" " * 3_000_000,
            PICKLE,
        )
    )
    (path / CONFIG).write_bytes(made)


def strange_files(path: Path, rng: random.Random) -> None:
    """Folders, links, pipes and holes in the place of files."""
    file = path / _file(rng)
    kind = rng.choice(
        ("folder", "outside", "loop", "nowhere", "inside", "pipe", "hole", "empty", "gone", "device")
    )
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "outside":
        file.symlink_to("/etc/passwd")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "nowhere":
        file.symlink_to(path / "nowhere")
    elif kind == "inside":
        (path / "real").write_bytes(content)
        file.symlink_to("real")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "hole":
        with open(file, "wb") as hole:
            hole.write(content[: rng.choice((0, 8, len(content)))])
            hole.truncate(rng.choice((2**20, 2**33, 2**40)))
    elif kind == "empty":
        file.touch()


def more_files(path: Path, rng: random.Random) -> None:
    """Put things beside the adapter that have no business there."""
    for _ in range(rng.choice((1, 3))):
        name = rng.choice(
            (
                "adapter_model.bin",
                "model.safetensors",
                "pytorch_model.bin.index.json",
                "adapter_model-00001-of-00002.safetensors",
                "optimizer.pt",
                "conftest.py",
                "__init__.py",
                "modeling.py",
                "added_tokens.json",
                "tokenizer_config.json",
                "x" * 200,
                "\udcff",
                "line\nbreak",
            )
        )
        content = rng.choice((PICKLE, b"", b"open('EXECUTED', 'w')", b'{"<a>": 10000000000}', b"[" * 10_000))
        target = path / name
        if not target.exists():
            target.write_bytes(content)
    if rng.random() < 0.2:
        (path / WEIGHTS).unlink()
        (path / "adapter_model.bin").write_bytes(PICKLE)


def swap_files(path: Path, rng: random.Random) -> None:
    """Exchange the contents of two files."""
    first, second = (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()
    (path / CONFIG).write_bytes(second)
    (path / WEIGHTS).write_bytes(first)


KINDS: tuple[Damage, ...] = (
    flip_bytes,
    cut,
    splice,
    lie_about_the_length,
    edit_header,
    strange_header,
    edit_config,
    strange_config,
    strange_files,
    more_files,
    swap_files,
)

WEIGHTS_OF_KINDS = (6, 2, 4, 1, 6, 2, 8, 1, 2, 2, 1)


def damaged(source: Path, target: Path, seed: int) -> tuple[str, ...]:
    """Copy an adapter and damage the copy, once or twice.

    Returns:
        The kinds of damage.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    rng = random.Random(seed)
    done = []
    for damage in rng.choices(KINDS, WEIGHTS_OF_KINDS, k=rng.choice((1, 1, 2))):
        if not all(_is_plain(target / name) for name in (CONFIG, WEIGHTS)):
            break
        try:
            damage(target, rng)
        except (ValueError, RecursionError, AttributeError, TypeError, IndexError):
            continue  # the first damage left nothing that the second could work on
        done.append(damage.__name__)
    return tuple(done)


def asking_too_much(
    source: Path, target: Path, seed: int, ways: Sequence[Damage] = EXCESSES
) -> tuple[str, ...]:
    """Copy an adapter and let the copy ask for more than it should, in one of these ways."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    rng = random.Random(seed)
    excess = rng.choice(ways)
    excess(target, rng)
    return (excess.__name__,)


def _is_plain(file: Path) -> bool:
    """Whether a file can be damaged further: no pipe that would block, no hole of a terabyte."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size < 50_000_000
