"""What runs in the limited process, from its source alone: the standard library and nothing of this package.

A request is a line of JSON, an answer another. The process sets its own alarms before each piece of work, so that it
ends by itself whatever becomes of the one that asked.
"""

from __future__ import annotations

import base64
import collections
import faulthandler
import io
import json
import pickle
import re
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes longer to load than most of the work
    from collections.abc import Callable
    from typing import Any

    Tuple = tuple[Any, ...]
else:
    Tuple = tuple

MEMORY = 256 * 2**20
"""Bytes of address space. Python takes about 30 MB of it."""

FRAMES = 300
"""Depth of calls: Python's parser of expressions calls itself for each group within a group."""


CACHE = "_MAXCACHE"
"""What Python calls the number of expressions that ``re`` keeps compiled."""

KEPT = 100_000
"""That number here, and in the process that asks while PEFT matches: it would compile long maps for every module."""


def rehearse(field: str, value: str | list[str], names: list[str]) -> list[list[Any]]:
    """Match as PEFT does it (``inject_adapter``, ``check_target_module_exists``, ``get_pattern_key`` in peft).

    Expressions that Python refuses are left to PEFT, which says so.

    Args:
        field: A field of the configuration.
        value: A text or a list of texts.
        names: Names of modules.

    Returns:
        Of each expression that is matched the places of the names that it means, and whether its text alone is one.
    """
    if isinstance(value, str):
        return [[matched(value, names, re.fullmatch), compiled(value) is not None]]
    if field in FORMS:
        forms = [FORMS[field].replace("{}", one) for one in value]
        return [
            [matched(form, names, re.match), compiled(one) is not None]
            for one, form in zip(value, forms, strict=True)
        ]
    if field == "target_modules":
        shortened(value, names)
    known = set(value)
    for name in names:
        name in known or any(name.endswith(f".{one}") for one in value)
    return []


FORMS = {
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
"""What PEFT makes of each text of a field before it matches."""


def matched(expression: str, names: list[str], match: Callable[[str, str], object]) -> list[int]:
    try:
        return [place for place, name in enumerate(names) if match(expression, name)]
    except re.error:
        return []


def expressions(forms: list[list[str]]) -> list[list[bool]]:
    """Which of these texts are regular expressions."""
    return [[compiled(text) is not None for text in some] for some in forms]


def fitting(forms: list[list[str]], names: list[str], wanted: list[str]) -> list[str | None]:
    """Of each list of expressions the first that fits whole names, and only wanted ones."""
    known = set(wanted)
    return [next((one for one in some if fits(one, names, known)), None) for some in forms]


def fits(text: str, names: list[str], wanted: set[str]) -> bool:
    expression = compiled(text)
    found = set() if expression is None else set(filter(expression.fullmatch, names))
    return bool(found) and found <= wanted


def compiled(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def shortened(texts: list[str], names: list[str]) -> set[str]:
    """A list shortened as PEFT does before it injects (``_find_minimal_target_modules``)."""
    ends, distinct = tuple("." + text for text in texts), set(texts)
    rest = [name for name in names if name not in distinct and not name.endswith(ends)]
    others = {end for name in rest for end in endings(name)}
    kept: set[str] = set()
    for text in distinct:
        for end in endings(text):
            if end in kept or end in others:
                continue
            if not any(text.endswith("." + one) for one in kept):
                kept.add(end)
                break
    return kept


def endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))][::-1]


class Storage(Tuple):
    """The file of numbers in the archive, and what they are: (type, key)."""


class Tensor(Tuple):
    """(storage, type where the storage has none, offset, shape, strides)."""


class Kind(str):
    """The name of a class of storages, or of a type of numbers."""


def rebuilt(storage: object, offset: object, shape: Any, strides: Any, *_: object) -> Tensor:
    return Tensor((storage, "", offset, tuple(shape), tuple(strides)))


def rebuilt_typed(
    storage: object,
    offset: object,
    shape: Any,
    strides: Any,
    grad: object,
    hooks: object,
    kind: str,
    *_: object,
) -> Tensor:
    return Tensor((storage, kind, offset, tuple(shape), tuple(strides)))


def parameter(tensor: object, *_: object) -> object:
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): rebuilt_typed,
    ("torch._utils", "_rebuild_parameter"): parameter,
}
KINDS = re.compile(r"[A-Za-z0-9]{1,20}Storage|[a-z0-9_]{1,24}")
MOST = 75_000
"""Tensors of one file, as in safetensors files."""
LONGEST = 1000
"""Characters of the name of one."""


class Unpickler(pickle.Unpickler):
    """Makes names of tensors and what there is to say of them: no tensor, and nothing that is not in a state dict."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("torch", "torch.storage") and KINDS.fullmatch(name):
            return Kind(name)
        raise pickle.UnpicklingError(f"it asks for {module[:60]}.{name[:60]}")

    def persistent_load(self, pid: Any) -> Storage:
        word, kind, key = pid[:3]
        if word != "storage" or type(kind) is not Kind or type(key) is not str:
            raise pickle.UnpicklingError("it refers to something else than numbers")
        return Storage((kind, key))


def unpickle(content: str) -> list[list[Any]]:
    """The tensors of a state dict that ``torch.save`` wrote: name, type, key, offset, shape and strides of each.

    Raises:
        pickle.UnpicklingError: It is something else.
    """
    state = Unpickler(io.BytesIO(base64.b64decode(content))).load()
    if not isinstance(state, dict) or len(state) > MOST:
        raise pickle.UnpicklingError("it holds something else than named tensors, or too many")
    found: list[list[Any]] = []
    for name, value in state.items():
        if (
            type(name) is str
            and isinstance(value, dict)
            and any(type(part) is Tensor for part in value.values())
        ):
            raise pickle.UnpicklingError(
                f"it is a whole state: the tensors lie one level deeper, in {name[:40]!r}"
            )
        if type(name) is not str or type(value) is not Tensor or type(value[0]) is not Storage:
            raise pickle.UnpicklingError("it holds something else than named tensors")
        if len(name) > LONGEST:
            raise pickle.UnpicklingError(f"a tensor has a name of {len(name):,} characters")
        (kind, key), typed, offset, shape, strides = value
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > 64:
            raise pickle.UnpicklingError("it has shapes that are none")
        if type(typed) not in (str, Kind) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise pickle.UnpicklingError("it has sizes that are none")
        found.append([name, typed or kind, key, offset, shape, strides])
    return found


WORK: dict[str, Callable[..., object]] = {
    "rehearse": rehearse,
    "unpickle": unpickle,
    "expressions": expressions,
    "fitting": fitting,
}


def answered(request: dict[str, Any]) -> dict[str, object]:
    try:
        return {"result": WORK[request["work"]](*request["arguments"])}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"limit": type(error).__name__}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def limit_process() -> None:
    sys.setrecursionlimit(FRAMES)
    setattr(re, CACHE, KEPT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # Windows has no such limits, macOS does not keep this one


def limit_time(seconds: float) -> None:
    """End the process when it has used so many seconds of a processor; where that cannot be, when they have passed."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    limit_process()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_time(request["seconds"])
        began = time.process_time()
        answer = answered(request)
        answer["seconds"] = time.process_time() - began
        written = json.dumps(answer).encode() + b"\n"
        limit_time(0)
        sys.stdout.buffer.write(written)
        sys.stdout.buffer.flush()
        re.purge()


if __name__ == "__main__":
    main()
