"""The text that the built-in base is pretrained on: the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lora.bases.tiny.text import BOS_ID, EOS_ID

if TYPE_CHECKING:
    from torch import Tensor


# Tests repeat themselves, idlelib, lib2to3 and turtledemo are applications, encodings are character tables,
# and the build's own settings (config-*, _sysconfigdata*) hold paths of the machine that built it.
EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_ONE_IN = 20


def standard_library_files() -> list[Path]:
    """Source files of the running Python's standard library, sorted by path, without the excluded ones."""
    root = Path(sysconfig.get_path("stdlib"))
    kept = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not any(
            part.startswith(EXCLUDED_PREFIXES) for part in parts
        ):
            kept.append(path)
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def token_streams() -> tuple[Tensor, Tensor, str]:
    """Read the standard library as two token streams, each file followed by the end-of-sequence id.

    Returns:
        Training stream and held-out stream (1-d, int16), and the SHA-256 of all text in reading order. Every
        file is wholly in one of the two: a twentieth is held out, chosen by the hash of its path.
    """
    import torch

    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    for path in standard_library_files():
        content = path.read_bytes()
        name = path.relative_to(root).as_posix().encode()
        digest.update(name + b"\0" + content)
        chosen = hashlib.sha256(name).digest()[0] % HELD_OUT_ONE_IN == 0
        ids = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(torch.int16) if content else None
        if ids is not None:
            (held_out if chosen else train).extend([ids, torch.tensor([EOS_ID], dtype=torch.int16)])
    return torch.cat(train), torch.cat(held_out), digest.hexdigest()


def windows(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """Cut windows out of a stream; the first token of each becomes the begin-of-sequence id.

    Args:
        stream: token ids, shape ``(n,)``.
        starts: first positions, shape ``(batch,)``, each at most ``n - length``.
        length: tokens in a window.

    Returns:
        int64 ids of shape ``(batch, length)``.
    """
    import torch

    ids = stream[starts[:, None] + torch.arange(length)].long()
    ids[:, 0] = BOS_ID
    return ids
