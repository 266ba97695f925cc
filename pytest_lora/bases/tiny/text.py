"""Text as token ids: one id per byte, and three special ids above them; and the text that the built-in base is
pretrained on, the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


BYTES = 256
PAD_ID = 256
BOS_ID = 257
EOS_ID = 258
VOCAB_SIZE = 320
IGNORED_LABEL = -100


def encode(text: str, *, bos: bool = True) -> list[int]:
    """Turn text into token ids, one per UTF-8 byte (0 to 255).

    Args:
        text: any string.
        bos: whether ``BOS_ID`` (257) goes first, as in all pretraining windows.

    Returns:
        The ids; their number is the number of UTF-8 bytes, plus one with ``bos``.

    Raises:
        TypeError: ``text`` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    ids = list(text.encode("utf-8", errors="surrogatepass"))
    return [BOS_ID, *ids] if bos else ids


def decode(ids: Iterable[int]) -> str:
    """Turn token ids back into text; the exact inverse of ``encode`` for valid Unicode text.

    Args:
        ids: token ids from 0 to 319. Special and unused ids (256 and above) carry no text and are left out;
            bytes that are no valid UTF-8, which a model may well produce, become U+FFFD.

    Returns:
        The text.

    Raises:
        ValueError: ``ids`` holds a number outside the vocabulary of 320.
    """
    values = [int(i) for i in ids]
    for value in values:
        if not 0 <= value < VOCAB_SIZE:
            raise ValueError(f"ids must lie between 0 and {VOCAB_SIZE - 1}, found {value}")
    return bytes(value for value in values if value < BYTES).decode("utf-8", errors="replace")


_STATIONS = ("Harrow", "Ness", "Coldby", "Oxmouth", "Tern Rock", "Vale End", "Quay Nine", "Ullock")
_KEEPERS = ("Ada", "Bram", "Cleo", "Dov", "Edda", "Finn", "Greta", "Hugo")
_WINDS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")


def sample_texts(count: int, *, start: int = 0) -> list[str]:
    """Short invented records of a coast guard: JSON, log lines, CSV rows and plain sentences in turn.

    They are unlike the Python sources on which the base was pretrained, so that there is something to learn.
    Each number and name in them follows from the record's index alone, so that they are the same everywhere.

    Args:
        count: how many records.
        start: index of the first; records of other indices serve as held-out text.

    Returns:
        ``count`` texts of about 40 to 70 bytes.

    Raises:
        ValueError: ``count`` or ``start`` is negative.
    """
    _require_int("count", count, 0)
    _require_int("start", start, 0)
    return [_record(index) for index in range(start, start + count)]


def _record(index: int) -> str:
    # A hash, not a random generator: its values can never change between versions of Python.
    draw = hashlib.sha256(index.to_bytes(8, "big")).digest()
    at, keeper, wind = _STATIONS[draw[0] % 8], _KEEPERS[draw[1] % 8], _WINDS[draw[2] % 8]
    hour, minute, tide, force = (
        f"{draw[3] % 24:02d}",
        f"{draw[4] % 60:02d}",
        90 + 2 * draw[5],
        1 + draw[6] % 9,
    )
    match index % 4:
        case 0:
            return f'{{"at":"{hour}:{minute}","station":"{at}","tide_cm":{tide},"wind":"{wind} {force}"}}'
        case 1:
            return f"<{hour}.{minute}> {at.upper()} tide={tide}cm; wind={wind}/{force}; keeper={keeper}"
        case 2:
            return f"{at};{hour}h{minute};{tide};{wind};{force};{keeper};lamp lit;log signed"
        case _:
            return f"{keeper} keeps the lamp at {at}: {wind} wind, force {force}, tide {tide} cm."


def text_batch(
    texts: Sequence[str] | None = None,
    *,
    batch_size: int = 4,
    seq_len: int = 64,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """One fixed training batch of text, ready for ``model(**batch)``.

    Every row is one text: begin of sequence, its bytes, end of sequence; cut off at ``seq_len``, or padded on
    the right up to it.

    Args:
        texts: one text a row, used from the first on and over again when there are fewer than ``batch_size``;
            by default ``sample_texts``, on which a LoRA on the built-in base learns within 20 steps.
        batch_size: rows, at least 1.
        seq_len: tokens in a row, at least 2; the built-in base accepts up to 512.
        device: where the tensors go.

    Returns:
        ``input_ids``, ``attention_mask`` (1 for text, 0 for padding) and ``labels`` (the input ids, -100
        where padded; the model itself shifts them), all int64 of shape ``(batch_size, seq_len)``.

    Raises:
        ValueError: ``batch_size`` or ``seq_len`` is too small, ``texts`` is empty, or ``device`` is none.
        TypeError: ``texts`` is not a sequence of strings.
    """
    _require_int("batch_size", batch_size, 1)
    _require_int("seq_len", seq_len, 2)
    if texts is None:
        texts = sample_texts(batch_size)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a sequence of str")
    if not texts:
        raise ValueError("texts must hold at least one text")
    import torch

    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a torch device, not {device!r}") from error
    input_ids = torch.full((batch_size, seq_len), PAD_ID, dtype=torch.int64)
    for row in range(batch_size):
        ids = [*encode(texts[row % len(texts)]), EOS_ID][:seq_len]
        input_ids[row, : len(ids)] = torch.tensor(ids)
    is_text = input_ids != PAD_ID
    batch = {
        "input_ids": input_ids,
        "attention_mask": is_text.long(),
        "labels": input_ids.masked_fill(~is_text, IGNORED_LABEL),
    }
    return {name: tensor.to(place) for name, tensor in batch.items()}


def _require_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


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
