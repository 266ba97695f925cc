"""What callables and objects hold, by name: code, defaults, closures, arguments, state, the user's globals."""

from __future__ import annotations

import dis
import functools
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LIBRARIES = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_FOLDERS = {"site-packages", "dist-packages"}


def title(value: Any) -> str:
    """What a value is called. Without its module, which is ``__main__`` in a script and not where it is imported."""
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return str(named.__qualname__)


def parts(function: Any) -> Iterator[tuple[str, Any]]:
    """What a callable is made of, by name."""
    if isinstance(function, functools.partial):
        yield from parts(function.func)
        yield from ((str(place), value) for place, value in enumerate(function.args))
        yield from sorted(function.keywords.items())
    elif isinstance(function, types.MethodType):
        if is_users(function.__module__):
            yield from parts(function.__func__)
        yield from state_of(function.__self__)
    elif isinstance(function, types.FunctionType):
        yield "code", function.__code__
        yield from _defaults(function)
        yield from _closure(function)
        if is_users(function.__module__):
            yield from sorted(_globals(function.__code__, function.__globals__), key=lambda one: one[0])
            yield from _imported_files(function.__code__, function.__globals__.get("__package__"))
    elif isinstance(function, types.BuiltinFunctionType):
        yield "object", function.__self__
    elif callable(wrapped := getattr(function, "__wrapped__", None)):  # of functools.cache and the like
        yield from parts(wrapped)
    else:
        call = inspect.getattr_static(type(function), "__call__", None)
        if isinstance(call, types.FunctionType) and is_users(type(function).__module__):
            yield from parts(call)
        yield from state_of(function)


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    yield from zip(names, given, strict=True)
    yield from sorted((function.__kwdefaults__ or {}).items())


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that is not yet bound
            yield name, None


def _globals(code: types.CodeType, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Globals that code names and that are the user's; of a user's module the attributes that it names."""
    names = set(_names(code))
    for name in names & known.keys():
        value = known[name]
        if isinstance(value, types.ModuleType):
            if is_users(value.__name__):
                found = ((each, getattr(value, each, None)) for each in names if hasattr(value, each))
                yield from ((f"{name}.{each}", one) for each, one in found if is_users_value(one))
        elif is_users_value(value):
            yield name, value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _imported_files(code: types.CodeType, package: str | None) -> Iterator[tuple[str, Any]]:
    """The user's modules that code imports when it runs: their files as they are, as they may not be loaded yet."""
    for name in sorted(_imports(code, package or "")):
        if (file := _file_of(name)) is not None and _is_users_file(file):
            yield f"import {name}", file.read_bytes()


def _imports(code: types.CodeType, package: str) -> set[str]:
    found: set[str] = set()
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, names = (one.argval for one in steps[place - 2 : place])
            name = (
                step.argval if not level else importlib.util.resolve_name("." * level + step.argval, package)
            )
            found |= {name, *(f"{name}.{each}" for each in names or ())}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _imports(constant, package)
    return found


def _file_of(module: str) -> Path | None:
    """The file of a module, found without importing it or what it is in."""
    folders: Any = None
    spec = None
    for part in range(1, module.count(".") + 2):
        spec = importlib.machinery.PathFinder.find_spec(".".join(module.split(".")[:part]), folders)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def is_users_value(value: Any) -> bool:
    """False for what a library defines; true for values, whoever made them."""
    if isinstance(value, types.ModuleType):
        return False
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return is_users(getattr(value, "__module__", None))
    return True


@functools.lru_cache(maxsize=4096)
def is_users(module: str | None) -> bool:
    """Whether a module is neither of Python nor installed; ``__main__`` and cells of a notebook are the user's."""
    if module is None or module.partition(".")[0] == "pytest_lora":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module in sys.modules and module not in sys.stdlib_module_names
    return _is_users_file(Path(file))


def _is_users_file(file: Path) -> bool:
    path = file.resolve()
    return not _FOLDERS & set(path.parts) and not any(path.is_relative_to(one) for one in _LIBRARIES)


def state_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The state of an object by name, as a pickle of it would hold it, without what it has cached."""
    _, args, state, items, pairs = reduced(value)
    if args:
        yield "made of", args
    named, *slots = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for given in (named, *slots):
        if isinstance(given, Mapping):
            yield from ((str(k), given[k]) for k in sorted(given, key=str) if not _is_cached(value, k))
        elif given is not None:
            yield "state", given
    if items is not None:
        yield "items", list(items)
    if pairs is not None:
        yield "entries", dict(pairs)


def _is_cached(value: Any, name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(type(value), name, None), functools.cached_property)


def reduced(value: Any) -> tuple[Any, Any, Any, Any, Any]:
    """What pickle would write: maker, its arguments, state, items, entries.

    Raises:
        Exception: Whatever an object raises that cannot be pickled.
    """
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return reduced, (), None, None, None
    maker, args, *rest = reduced
    state, items, pairs = (*rest, None, None, None)[:3]
    if args and args[0] is type(value):
        args = args[1:]
    return maker, args, state, items, pairs
