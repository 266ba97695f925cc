"""What functions and configurations hold, by value: so that a journal knows whether a sweep is still the same one.

Read are code, defaults, closures, arguments of a ``partial``, the object of a bound method, the state of objects as
pickle would take it, and whatever of the user's own modules the code refers to. Libraries count by name. Large tensors
and lists count by a sample. What cannot be read is named.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from typing import Any

from pytest_lora.sweep.held import is_users, parts, reduced, state_of, title

MOST_ITEMS = 10_000
"""Of a longer list as many items are read, evenly spread; of a larger tensor as many numbers."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice)
_NO_VALUE = ("_thread.lock", "_thread.RLock", "logging.Logger", "logging.RootLogger")
"""Objects that change nothing of a trial."""


class Reader:
    """Reads values into digests.

    Attributes:
        unread: What could not be read, as text such as ``"train.stream (generator)"``.
    """

    def __init__(self) -> None:
        self.unread: list[str] = []

    def function(self, name: str, function: Any) -> dict[str, str]:
        """A function as settings: its code under ``name``, and a line ``name.x`` for each value it holds."""
        settings = {name: title(function)}
        for part, value in parts(function):
            key = name if part == "code" else f"{name}.{part}"
            text = self.text(key, value)
            settings[key] = f"{settings[name]}@{text}" if part == "code" else text
        return settings

    def text(self, name: str, value: Any) -> str:
        """A short value as it is; of another its type and a digest."""
        if isinstance(value, _PLAIN) and len(text := repr(value)) < 80:
            return text
        walk = _Walk()
        digest = walk.digest(value)
        self.unread += [f"{name}{path} ({kind})" for path, kind in walk.unread]
        return digest if isinstance(value, types.CodeType) else f"{title(value)}@{digest}"


class _Walk:
    """One digest, over everything that hangs on a value. Equal values count alike, whether or not they are one."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.done: dict[int, str] = {}
        self.open: set[int] = set()
        self.alive: list[Any] = []
        self.unread: dict[tuple[str, str], None] = {}

    def digest(self, value: Any) -> str:
        self.feed("", value)
        return self.sha.hexdigest()[:12]

    def say(self, text: str) -> None:
        self.sha.update(f"{text};".encode("utf-8", "backslashreplace"))

    def feed(self, path: str, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.say(f"{type(value).__name__} {value!r}")
        elif id(value) in self.open:
            self.say("cycle")
        else:
            if id(value) not in self.done:
                self.done[id(value)] = self._digest_of(path, value)
            self.say(self.done[id(value)])

    def _digest_of(self, path: str, value: Any) -> str:
        self.alive.append(value)  # so that no other object gets its id
        self.open.add(id(value))
        outer, self.sha = self.sha, hashlib.sha256()
        try:
            self._feed(path, value)
        except Exception:  # whatever an object raises, or depth
            self.unread[path, type(value).__qualname__] = None
        finally:
            inner, self.sha = self.sha, outer
            self.open.remove(id(value))
        return inner.hexdigest()

    def _feed(self, path: str, value: Any) -> None:
        kind = type(value)
        if isinstance(value, (list, tuple)) and kind in (list, tuple):
            self.say(f"{kind.__name__} {len(value)}")
            for index in range(0, len(value), _stride(len(value))):
                self.feed(f"{path}[{index}]", value[index])
        elif kind in (dict, types.MappingProxyType):
            self._entries(path, value)
        elif kind in (set, frozenset):
            self.say(f"set {len(value)} {sorted(_Walk().digest(item) for item in value)}")
        elif isinstance(value, types.CodeType):
            self._code(path, value)
        elif isinstance(value, (types.ModuleType, types.MemberDescriptorType)):
            self.say(f"{kind.__name__} {value.__name__}")
        elif isinstance(value, type):
            self._class(path, value)
        elif callable(value) and not _is_tensor(value) and not _is_module(value):
            self._callable(path, value)
        elif not self._known(path, value):
            self._object(path, value)

    def _entries(self, path: str, value: Mapping[Any, Any]) -> None:
        """In their order, which may be that of the data."""
        self.say(f"dict {len(value)}")
        keys = list(value)
        for key in keys[:: _stride(len(keys))]:
            self.feed(f"{path}[key]", key)
            self.feed(f"{path}[{key!r:.40}]", value[key])

    def _code(self, path: str, code: types.CodeType) -> None:
        self.say(f"code {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_flags}")
        for constant in code.co_consts:
            self.feed(path, constant)

    def _class(self, path: str, value: type) -> None:
        if not is_users(value.__module__):
            self.say(f"class {value.__module__}.{value.__qualname__}")
            return
        self.say(f"class {value.__qualname__}")
        for base in value.__bases__:
            self.feed(path, base)
        for name, member in sorted(vars(value).items()):
            if not name.startswith("__") or isinstance(member, types.FunctionType):
                self.say(name)
                self.feed(f"{path}.{name}", member)

    def _callable(self, path: str, value: Any) -> None:
        module = getattr(value, "__module__", None) or type(value).__module__
        self.say(f"callable {title(value) if is_users(module) else f'{module}.{title(value)}'}")
        plain = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
        if plain and not is_users(module) and not getattr(value, "__closure__", None):
            return
        for name, part in parts(value):
            self.say(name)
            self.feed(f"{path}.{name}", part)

    def _known(self, path: str, value: Any) -> bool:
        """Values that have a better digest than their pickle."""
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if name in _NO_VALUE or isinstance(value, (property, staticmethod, classmethod)):
            self.say(name)
            for part in ("fget", "fset", "__func__"):
                self.feed(path, getattr(value, part, None))
        elif _is_tensor(value):
            self._tensor(path, value)
        elif _is_module(value):
            self._module(path, value)
        elif isinstance(fingerprint := getattr(value, "_fingerprint", None), str):  # of a datasets.Dataset
            self.say(f"{name} {fingerprint}")
        elif name == "torch._C.Generator":
            self.feed(path, value.get_state())
        elif isinstance(value, functools.cached_property):
            self.feed(path, value.func)
        else:
            return False
        return True

    def _tensor(self, path: str, value: Any) -> None:
        self.say(f"tensor {value.dtype} {tuple(value.shape)}")
        if hasattr(value, "detach"):
            if value.device.type == "meta":
                return
            value = value.detach()
        flat = value.reshape(-1)
        flat = flat[:: _stride(len(flat))]
        if hasattr(flat, "cpu"):
            flat = flat.cpu().contiguous()
            # NumPy has no bfloat16; bytes are the same for all.
            flat = flat.view(_torch().uint8).numpy() if len(flat) else flat.numpy()
        if flat.dtype == object:
            self.feed(path, flat.tolist())
        else:
            self.sha.update(flat.tobytes())

    def _module(self, path: str, value: Any) -> None:
        """A model: what it is built of, its configuration, and every tensor by a sample."""
        self.say(repr(value))
        for kind in sorted({type(module) for module in value.modules()}, key=lambda one: one.__qualname__):
            self.feed(path, kind)
        config: Any = getattr(value, "config", None)
        if hasattr(config, "to_dict"):
            self.feed(f"{path}.config", config.to_dict())
        for name, tensor in value.state_dict(keep_vars=True).items():
            self.say(name)
            self.feed(f"{path}.{name}", tensor)

    def _object(self, path: str, value: Any) -> None:
        self.say("object")
        self.feed(path, type(value))
        maker = reduced(value)[0]
        self.say(maker if isinstance(maker, str) else title(maker))
        for name, part in state_of(value):
            self.say(name)
            self.feed(f"{path}.{name}", part)


def _stride(count: int) -> int:
    return max(1, -(-count // MOST_ITEMS))


def _torch() -> Any:
    return sys.modules["torch"]


def _is_of(value: Any, library: str, name: str) -> bool:
    """Whether a value is an instance of a class of a library, which is not loaded for the question."""
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, name, ()))


def _is_tensor(value: Any) -> bool:
    return _is_of(value, "torch", "Tensor") or _is_of(value, "numpy", "ndarray")


def _is_module(value: Any) -> bool:
    return _is_of(value, "torch.nn", "Module")
