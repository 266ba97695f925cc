"""Facts about the tensors of a saved adapter: their names, their values, their modules, and the tool that wrote them.

A file has up to 75,000 tensors, and a named tuple is made in a third of the time that a frozen dataclass takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "module": "DDP or DeepSpeed",
}
"""What wrappers call the model that they hold, and so put into the keys of its state dict."""

_WITHIN = frozenset(WRAPPERS) - {"module"}
"""Those that are told anywhere in a key: a base may call a part of itself ``module``."""

_LORA = re.compile(
    r"^(?:(?P<module>.*)\.)?(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<kind>weight|bias))?$"
)
_FACTOR_OF_OTHER_TOOLS = re.compile(r"\.lora_(?:down|up|a|b)\b")


@dataclass(frozen=True, slots=True)
class Marks:
    """Which parts of a factor hold anything but zeros.

    Attributes:
        rows: Whether each row does; empty where there are too many to be ranks.
        columns: Whether each column does; empty likewise.
        zero_rows: Rows that are zero, where they are one block at an end; else 0.
    """

    rows: tuple[bool, ...]
    columns: tuple[bool, ...]
    zero_rows: int


class Values(NamedTuple):
    """What the numbers of a tensor are like.

    Attributes:
        nans: How many are NaN.
        infinities: How many are infinite.
        zero: Whether all are zero.
        rms: Their root mean square; None where it was not measured, which it is of ``lora_B`` alone.
        marks: Which parts of ``lora_A`` or ``lora_B`` hold anything; None of other tensors.
        underflow: Share of zeros, and share of the other numbers that lie below the smallest normal one of float16;
            None where it was not measured, which it is of ``lora_B`` in float16 alone.
    """

    nans: int
    infinities: int
    zero: bool
    rms: float | None = None
    marks: Marks | None = None
    underflow: tuple[float, float] | None = None


class TensorFacts(NamedTuple):
    """One tensor of the file.

    Attributes:
        name: Its key.
        dtype: As safetensors writes it (``"F32"``, ``"BF16"``, ``"I8"``, ...).
        shape: Its sizes.
        values: What its numbers are like; None where they were not read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Values | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        product = 1
        for size in self.shape:
            product *= size
        return product


class Key(NamedTuple):
    """A key of the file taken apart.

    Attributes:
        module: The base module that it is about, without prefixes and wrappers.
        part: ``"lora_A"``, ``"lora_B"``, ``"lora_embedding_A"``, ``"lora_embedding_B"`` or
            ``"lora_magnitude_vector"``; ``""`` for anything else.
        prefixes: How often ``base_model.model.`` stands before the module.
        wrappers: Names of wrappers that stand in it, in their order.
        adapter: The name of the adapter, where that stands in it, else ``""``.
        peft_name: The key as PEFT would write it.
        is_cut: Whether ``.weight`` is missing at its end, without which PEFT takes it for something else.
        before: What stands before the first ``base_model.model.``, wrappers aside.
        tool_name: What another tool calls the factor (``"lora_down"``), else ``""``.
    """

    module: str
    part: str
    prefixes: int
    wrappers: tuple[str, ...]
    adapter: str
    peft_name: str
    is_cut: bool = False
    before: str = ""
    tool_name: str = ""

    @classmethod
    def of(cls, name: str, own_module: bool = False) -> Key:
        """Take a key apart; ``own_module`` says that the base calls a part of itself ``module``."""
        rest, inside = name, tuple[str, ...]()
        if "_module" in name or "_orig_mod" in name:
            steps = name.split(".")
            inside = tuple(step for step in steps if step in _WITHIN)
            rest = ".".join(step for step in steps if step not in _WITHIN) if inside else name
        prefixes, outside = 0, 0
        while True:
            if rest.startswith(PREFIX):
                rest, prefixes = rest.removeprefix(PREFIX), prefixes + 1
            elif rest.startswith("module.") and not (own_module and prefixes):
                rest, outside = rest.removeprefix("module."), outside + 1
            else:
                break
        before = ""
        if not prefixes and f".{PREFIX}" in rest:
            before, _, rest = rest.partition(f".{PREFIX}")
        wrappers = inside + ("module",) * outside
        module, end = _ending(rest)
        if end is None:
            module = rest.rpartition(".")[0] or rest
            other = _FACTOR_OF_OTHER_TOOLS.search(rest)
            tool_name = other[0][1:] if other else ""
            return cls(module, "", prefixes, wrappers, "", PREFIX + rest, before=before, tool_name=tool_name)
        return cls(
            module,
            end.part,
            prefixes,
            wrappers,
            end.adapter,
            f"{PREFIX}{module}.{end.as_peft}",
            end.is_cut,
            before,
        )


class _End(NamedTuple):
    """What follows the module in the key of a factor."""

    part: str
    adapter: str
    as_peft: str
    is_cut: bool


def _ending(key: str) -> tuple[str, _End | None]:
    """The module of a key without prefixes, and what follows it, where that is a factor's."""
    module, dot, rest = key.rpartition(".lora_")
    end = _known_end(rest) if dot and len(rest) < 100 and "\n" not in key else None
    if end is not None:
        return module, end
    found = _LORA.match(key)  # also of adapters that are called like a factor
    return ("", None) if found is None else (found["module"] or "", _end(found))


@lru_cache(4096)
def _known_end(rest: str) -> _End | None:
    found = _LORA.match(f"lora_{rest}")
    return None if found is None or found["module"] is not None else _end(found)


def _end(found: re.Match[str]) -> _End:
    part, kind = found["part"], found["kind"]
    bare = part in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    as_peft = part if bare else f"{part}.{kind or 'weight'}"
    return _End(part, found["adapter"] or "", as_peft, not bare and kind is None)


def target_of(module: str) -> str:
    """The module that a configuration names: attention takes its out_proj along, under ``base_layer``."""
    return module.partition(".base_layer.")[0].removesuffix(".base_layer")


class AdaptedModule(NamedTuple):
    """A base module for which the file holds LoRA tensors.

    Attributes:
        name: Name of the module in the base.
        a: ``lora_A`` (or ``lora_embedding_A``), or None.
        b: ``lora_B`` (or ``lora_embedding_B``), or None.
        magnitude: DoRA's vector, or None.
        configured_rank: The rank that the configuration gives it, or None where there is none to read.
    """

    name: str
    a: TensorFacts | None
    b: TensorFacts | None
    magnitude: TensorFacts | None
    configured_rank: int | None

    @property
    def rank(self) -> int | None:
        """Rows of ``lora_A``, which are the rank; None where they cannot be read."""
        shape = self.a.shape if self.a is not None else ()
        return shape[0] if len(shape) > 1 and 0 not in shape else None

    @property
    def b_rank(self) -> int | None:
        """Columns of ``lora_B``, which are the rank as well; None where they cannot be read."""
        shape = self.b.shape if self.b is not None else ()
        return shape[1] if len(shape) > 1 and 0 not in shape else None

    @property
    def target(self) -> str:
        """The module that a configuration names."""
        return target_of(self.name)

    @property
    def ranks_agree(self) -> bool:
        """Whether both factors are of one rank; of a convolution in groups lora_B has the rank of one group."""
        rank, columns = self.rank, self.b_rank
        if rank == columns or not rank or not columns:
            return rank == columns
        return self.a is not None and len(self.a.shape) > 2 and rank % columns == 0

    @property
    def turned(self) -> tuple[str, ...]:
        """Factors whose other side has the configured rank: they are transposed, or in each other's place."""
        wanted = self.configured_rank
        sides = (("lora_A", self.a, 0), ("lora_B", self.b, 1))
        return tuple(
            part
            for part, tensor, side in sides
            if tensor is not None
            and not tensor.name.endswith(("lora_embedding_A", "lora_embedding_B"))
            and len(tensor.shape) == 2
            and tensor.shape[side] != wanted == tensor.shape[1 - side]
        )

    @property
    def zero_parts(self) -> tuple[str, ...]:
        """Which of its factors, and DoRA's magnitude, are all zero, as far as values were read."""
        parts = (("lora_B", self.b), ("lora_A", self.a), ("lora_magnitude_vector", self.magnitude))
        return tuple([part for part, t in parts if _is_zero(t)])

    @property
    def holds_nothing(self) -> bool:
        """Whether one of them is all zero."""
        return _is_zero(self.b) or _is_zero(self.a) or _is_zero(self.magnitude)


def _is_zero(tensor: TensorFacts | None) -> bool:
    return tensor is not None and tensor.values is not None and tensor.values.zero


OTHER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapters.safetensors", "adapter.safetensors")
"""What diffusers, mlx-lm and AdapterHub call a file of LoRA weights."""

_KEYS = (
    ("kohya-ss", re.compile(r"^lora_(?:unet|te\d?|transformer)_|\.(?:hada_w\d|lokr_w\d|diff)(?:_[ab])?$")),
    ("diffusers", re.compile(r"^(?:unet|transformer|text_encoder(?:_\d)?)\..*lora|[._]lora\.(?:down|up)\.")),
    ("kohya-ss", re.compile(r"lora_(?:down|up)\b")),
    ("AdapterHub", re.compile(r"\.loras\.[^.]+\.lora_[AB]$")),
    ("torchtune", re.compile(r"^layers\.\d+\.(?:attn|mlp)\..*\.lora_[ab]\.weight$")),
    ("mlx-lm", re.compile(r"\.lora_[ab]$")),
)
"""How the keys of other tools look."""

_FILES = (
    ("diffusers", re.compile(r"pytorch_lora_weights\.(?:safetensors|bin)")),
    ("mlx-lm", re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)")),
    ("AdapterHub", re.compile(r"pytorch_adapter\.bin|adapter\.safetensors|adapter_setup\.json")),
    ("torchtune", re.compile(r"adapter_(?:model|\d+)\.pt")),
)
"""What other tools call the files of an adapter: diffusers ``LORA_WEIGHT_NAME``, mlx-lm ``tuner/trainer.py``, adapters
``utils.py``, torchtune ``training/checkpointing/_utils.py``."""


def tool_of_keys(names: Iterable[str]) -> str | None:
    """The tool whose keys are among these; None where there is none."""
    held = tuple(names)
    return next((tool for tool, keys in _KEYS if any(keys.search(name) for name in held)), None)


def tool_of_files(names: Iterable[str]) -> str | None:
    """The tool whose files are among these; None where there is none."""
    held = tuple(names)
    return next((tool for tool, files in _FILES if any(files.fullmatch(name) for name in held)), None)
