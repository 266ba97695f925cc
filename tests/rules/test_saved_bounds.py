"""Rules on saved adapters, each of their conditions alone, on facts of a file and of a base made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.facts.base import BaseModule
from pytest_lora.facts.checkpoint import CheckpointFacts, Entry, FileFault
from pytest_lora.facts.config import Fit, Misfit
from pytest_lora.facts.saved_tensors import AdaptedModule, Key, Marks, TensorFacts, Values
from pytest_lora.rules.remedies import name_in_keys
from tests.changed import replace
from tests.facts.test_adapter_maps import saved
from tests.rules.made import BASE
from tests.rules.saying import says, told
from tests.rules.test_checkpoint_bounds import configured, with_tensors

Q = "model.layers.0.q"
ONE = configured(saved([Q]))
TWO = configured(saved([Q, "model.layers.1.q"]))


def fitted(facts: CheckpointFacts, base: dict[str, Any] | None = None, **fields: Any) -> CheckpointFacts:
    return replace(
        facts, fit=Fit(replace(BASE, **(base or {})), **{"base_name": None, "config": None, **fields})
    )


def with_config(facts: CheckpointFacts, **changes: Any) -> CheckpointFacts:
    assert facts.config is not None
    return replace(facts, config=replace(facts.config, **changes))


def tensor(name: str, *shape: int, dtype: str = "F32", **values: Any) -> TensorFacts:
    known = Values(**{"nans": 0, "infinities": 0, "zero": False, **values})
    return TensorFacts(f"base_model.model.{name}", dtype, shape or (2, 2), known)


def plain(facts: CheckpointFacts, *tensors: TensorFacts) -> CheckpointFacts:
    return with_tensors(facts, *tensors)


def only(*tensors: TensorFacts, **fields: Any) -> CheckpointFacts:
    facts = configured(saved([]), **fields)
    return with_tensors(facts, *tensors)


def module(
    name: str,
    a: tuple[int, ...] | None = (2, 8),
    b: tuple[int, ...] | None = (8, 2),
    *,
    rank: int | None = 2,
    **marks: Any,
) -> AdaptedModule:
    """A module with factors of these shapes; ``zero`` and ``marks`` are of lora_B."""
    found = [
        None
        if shape is None
        else tensor(f"{name}.lora_{part}.weight", *shape, **(marks if part == "B" else {}))
        for part, shape in (("A", a), ("B", b))
    ]
    return AdaptedModule(name, found[0], found[1], None, rank)


def of(*modules: AdaptedModule, **fields: Any) -> CheckpointFacts:
    tensors = [t for m in modules for t in (m.a, m.b, m.magnitude) if t is not None]
    facts = only(*tensors, **fields)
    return replace(facts, adapted=modules)


UNREADABLE = FileFault("adapter_model.safetensors", "format", "it is none")


def unjudged(facts: CheckpointFacts) -> CheckpointFacts:
    """The same file where its tensors could not be read."""
    return replace(facts, faults=(UNREADABLE,))


# ------------------------------------------------------------------ the name of the adapter in the keys

NAMED = replace(configured(saved(["a.q"])), name="it")


@pytest.mark.parametrize(
    ("facts", "is_told"),
    [
        (fitted(NAMED, wanted=frozenset({"base_model.model.a.it.q.lora_A.weight"})), True),
        (fitted(NAMED, wanted=frozenset({"base_model.model.a.it.q.lora_A.weight", "x.lora_A.weight"})), True),
        (fitted(NAMED, wanted=frozenset({"base_model.model.a.other.q.lora_A.weight"})), False),
        (fitted(NAMED, wanted=frozenset({"base_model.model.a.q.lora_A.weight"})), False),
        (fitted(NAMED, wanted=frozenset({"base_model.model.a.it.q.weight"})), False),
        (
            fitted(replace(NAMED, adapted=()), wanted=frozenset({"base_model.model.a.it.q.lora_A.weight"})),
            False,
        ),
        (NAMED, False),
    ],
)
def test_the_name_of_the_adapter_in_the_keys(facts: CheckpointFacts, is_told: bool) -> None:
    found = name_in_keys(facts)
    assert (found is not None and "the adapter is called 'it'" in found) if is_told else found is None


# ------------------------------------------------------------------ files

PICKLE, TENSORS = "adapter_model.bin", "adapter_model.safetensors"


def folder(*names: str, weights: str | None = TENSORS, sizes: int = 10, **changes: Any) -> CheckpointFacts:
    return replace(
        ONE, entries=tuple(Entry(name, "file", sizes) for name in names), weights=weights, **changes
    )


def sized(ours: int, theirs: int, *more: str) -> CheckpointFacts:
    facts = folder(TENSORS, PICKLE, *more)
    sizes = {TENSORS: ours, PICKLE: theirs}
    return replace(facts, entries=tuple(replace(e, bytes=sizes.get(e.name, 10)) for e in facts.entries))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (folder(PICKLE, weights=None), ["warning: the adapter is a pickle"]),
        (folder(PICKLE, "a.pt", weights=None), ["warning: the adapter is a pickle", "info: 1 pickle lies beside"]),
        (folder(TENSORS, PICKLE), ["info: 1 pickle lies beside"]),
        (folder(TENSORS, "a.pt", "b.pt"), ["info: 2 pickles lie beside"]),
        (folder(TENSORS), []),
        (folder("a.pt", weights=None), ["info: 1 pickle lies beside"]),
        (sized(100_000, 500), ["warning: adapter_model.bin of 500 B lies beside adapter_model.safetensors of 97"]),
        (sized(100_000, 500, "a.pt"), ["warning: by their sizes they hold different tensors", "info: a.pt in it"]),
    ],
)  # fmt: skip
def test_pickles(facts: CheckpointFacts, words: list[str]) -> None:
    says("weights_are_pickled", facts, *words)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (folder(weights=None), ["error: there is no adapter_model.safetensors beside adapter_config.json"]),
        (folder("x.safetensors", weights=None), ["error: if x.safetensors is the adapter, rename it"]),
        (folder("x.gguf", weights=None), ["error: x.gguf is for llama.cpp, whose GGUF PEFT does not read"]),
        (
            folder("x.gguf", "y.safetensors", weights=None),
            ["error: if y.safetensors is the adapter, rename it"],
        ),
        (
            folder("pytorch_lora_weights.safetensors", weights=None),
            ["error: load it with load_lora_weights of the"],
        ),
        (
            folder("adapter_0.pt", weights=None),
            ["error: if adapter_0.pt holds the adapter, load it and save"],
        ),
        (folder("optimizer.pt", "rng_state_0.pth", weights=None), ["error: copy the missing file"]),
        (folder("x.distcp", weights=None), ["error: x.distcp is of a distributed checkpoint"]),
        (folder("global_step10", weights=None), ["error: global_step10 is of a distributed checkpoint"]),
        (folder("pytorch_model_fsdp_0", weights=None), ["error: pytorch_model_fsdp_0 is of a distributed"]),
        (folder(), []),
        (replace(folder(weights=None), config=None), []),
        (with_config(folder(weights=None), tool="mlx-lm"), []),
        (folder(PICKLE, weights=None), []),
        (folder("adapter_model-00001-of-00002.safetensors", weights=None), []),
        (folder("model.safetensors", weights=None), []),
    ],
)
def test_missing_weights(facts: CheckpointFacts, words: list[str]) -> None:
    says("weights_are_missing", facts, *words)


SHARD = "adapter_model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("facts", "is_told"),
    [
        (folder(SHARD, weights=None), True),
        (folder(SHARD), False),
        (folder(SHARD, PICKLE, weights=None), False),
        (folder("x", weights=None), False),
    ],
)
def test_shards(facts: CheckpointFacts, is_told: bool) -> None:
    says("weights_are_sharded", facts, *(["error: PEFT loads none of them"] if is_told else []))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            folder("model.safetensors"),
            ["warning: adapter_config.json and adapter weights lie beside the full model"],
        ),
        (folder("model.safetensors", PICKLE, weights=None), ["warning: and adapter weights lie"]),
        (folder("model.safetensors", SHARD, weights=None), ["warning: and adapter weights lie"]),
        (
            folder("model.safetensors", weights=None),
            ["error: adapter_config.json without adapter weights lies beside"],
        ),
        (folder("model.safetensors", weights=None), ["error: rename it to adapter_model.safetensors"]),
        (replace(folder("model.safetensors"), config=None), []),
        (folder("other.safetensors"), []),
    ],
)
def test_a_full_model_beside_it(facts: CheckpointFacts, words: list[str]) -> None:
    says("adapter_lies_beside_a_full_model", facts, *words)


def fault(file: str, kind: Any = "format") -> FileFault:
    return FileFault(file, kind, "it is broken")


NO_CONFIG = replace(ONE, config=None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (NO_CONFIG, ["error: the folder holds nothing at all"]),
        (
            replace(folder("a", "b", "c", "d", "e", "f"), config=None),
            ["error: the folder holds a, b, c, d, e"],
        ),
        (replace(NO_CONFIG, within=("x", "y")), ["error: folders of their own: point to x or y"]),
        (replace(NO_CONFIG, faults=(fault("adapter_config.json"),)), []),
        (replace(NO_CONFIG, faults=(fault("other"),)), ["error: there is no"]),
        (replace(NO_CONFIG, faults=(fault("it", "denied"),)), []),
        (replace(NO_CONFIG, faults=(fault("it"),)), ["error: there is no"]),
        (replace(NO_CONFIG, faults=(fault("other", "denied"),)), ["error: there is no"]),
        (ONE, []),
        (replace(folder("adapters.safetensors", weights="adapters.safetensors"), config=None), []),
    ],
)
def test_a_missing_configuration(facts: CheckpointFacts, words: list[str]) -> None:
    says("config_is_missing", facts, *words)
    assert all("e, f" not in one.observed for one in told("config_is_missing", facts))


FAULTS = [
    ("adapter_config.json", "format", ["error: save the adapter again, or copy"], []),
    ("adapter_config.json", "pointer", ["error: run `git lfs pull`"], []),
    ("x.safetensors", "format", [], ["error: copy or download"]),
    ("x.safetensors", "link", [], ["error: put a copy of the file"]),
    ("tokenizer_config.json", "format", [], ["info: copy or download"]),
    ("added_tokens.json", "size", [], ["info: save the adapter again"]),
]


@pytest.mark.parametrize(("file", "kind", "config", "others"), FAULTS)
def test_files_that_cannot_be_read(file: str, kind: str, config: list[str], others: list[str]) -> None:
    facts = replace(ONE, faults=(fault(file, kind),))
    says("config_is_not_readable", facts, *config)
    says("file_is_not_readable", facts, *others)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (folder("a.py", "b.so"), ["info: code comes with the adapter: a.py, b.so;"]),
        (
            folder("1.py", "2.py", "3.py", "4.py", "5.py", "6.py"),
            ["info: 1.py, 2.py, 3.py, 4.py, 5.py; none"],
        ),
        (with_config(ONE, code=("auto_map",)), ["info: auto_map in adapter_config.json"]),
        (replace(folder("a.py"), config=None), ["info: a.py; none"]),
        (folder("a.txt"), []),
    ],
)
def test_code(facts: CheckpointFacts, words: list[str]) -> None:
    found = told("folder_carries_code", facts)
    says(
        "folder_carries_code",
        facts,
        *(f"{one.severity}{text[4:]}" for one, text in zip(found, words, strict=True)),
    )


# ------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"fields": ("lora_alpha", "peft_type")}, ["warning: r is missing; PEFT takes its default, 8"]),
        ({"fields": ("r", "peft_type")}, ["warning: lora_alpha is missing; PEFT takes its default, 8"]),
        ({"fields": ("r", "lora_alpha")}, ["error: add peft_type='LORA'"]),
        ({"fields": (), "peft_type": "LOHA"}, []),
    ],
)
def test_fields_that_are_missing(changes: dict[str, Any], words: list[str]) -> None:
    facts = with_config(ONE, fields=("r", "lora_alpha", "peft_type"))
    says("config_lacks_fields", with_config(facts, **changes), *words)
    says("config_lacks_fields", NO_CONFIG)


NAMELESS = with_config(ONE, base=None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (NAMELESS, ["warning: base_model_name_or_path is missing or null"]),
        (with_config(ONE, base="org/base"), []),
        (with_config(NAMELESS, library="timm.models"), []),
        (with_config(NAMELESS, library="transformers.models"), ["warning: missing or null"]),
        (replace(NAMELESS, config=None), []),
        (unjudged(NAMELESS), []),
        (
            replace(with_config(ONE, base="it"), names_itself=True),
            ["warning: is the path of this adapter itself"],
        ),
        (
            replace(
                folder("model.safetensors"), names_itself=True, config=with_config(ONE, base="it").config
            ),
            [],
        ),
        (fitted(NAMELESS, base_name="org/x"), ["warning: write base_model_name_or_path='org/x' into"]),
        (
            fitted(configured(saved(["other"])), base_name="org/x"),
            ["warning: the name of the base that the adapter"],
        ),
    ],
)
def test_the_name_of_the_base(facts: CheckpointFacts, words: list[str]) -> None:
    says("base_name_is_missing", facts, *words)


def named(theirs: str | None, ours: str | None, **changes: Any) -> CheckpointFacts:
    return replace(fitted(with_config(ONE, base=theirs), base_name=ours), **changes)


@pytest.mark.parametrize(
    ("facts", "severity"),
    [
        (named("org/llama-7b", "org/llama-13b"), "warning"),
        (named("org/llama-7b", "other/llama-7b"), None),
        (named("org/Llama-7B", "unsloth/llama-7b-bnb-4bit"), None),
        (named("org/llama-7b", "org/llama-7b-unsloth-bnb-4bit"), None),
        (named("org/llama-7b", "/models/llama-13b"), "info"),
        (named("~/llama-7b", "org/llama-13b"), "info"),
        (named("a/b/llama-7b", "org/llama-13b"), "info"),
        (named("c:\\models\\llama-7b", "org/llama-13b"), "info"),
        (named("./llama-7b", "llama-13b"), "info"),
        (named("/x/models--org--llama-7b/snapshots/abc", "org/llama-7b"), None),
        (named("/x/models--org--llama-7b/snapshots/abc", "org/llama-13b"), "info"),
        (named("/x/llama-7b/config.json", "org/llama-7b"), None),
        (named("/x/checkpoint-100", "org/llama-7b"), None),
        (named("org/llama-7b", "/tmp/output"), None),
        (named("/", "org/llama-7b"), None),
        (named(None, "org/llama-7b"), None),
        (named("org/llama-7b", None), None),
        (named("org/llama-7b", "org/llama-13b", config=None), None),
        (named("org/llama-7b", "org/llama-13b", fit=None), None),
        (named("org/llama-7b", "org/llama-13b", names_itself=True), None),
        (named("org/llama-7b", "org/llama-13b", adapted=saved(["other"]).adapted), None),
    ],
)
def test_another_base(facts: CheckpointFacts, severity: str | None) -> None:
    says(
        "base_name_differs", facts, *([f"{severity}: the adapter is for the base model"] if severity else [])
    )


@pytest.mark.parametrize(
    ("facts", "serve", "words"),
    [
        (with_config(ONE, peft_type="LOHA"), None, ["warning: peft_type is LOHA, but all 2 tensors"]),
        (
            with_config(with_tensors(ONE, tensor("head.weight")), peft_type="LOHA"),
            None,
            ["info: peft_type LOHA: keys"],
        ),
        (with_config(ONE, tool="mlx-lm"), "mlx", []),
        (with_config(ONE, tool="mlx-lm"), "vllm", ["error: this is an adapter of mlx-lm"]),
        (with_config(ONE, tool="mlx-lm"), None, ["warning: this is an adapter of mlx-lm"]),
        (with_config(ONE, tool="diffusers"), None, ["info: this is an adapter of diffusers"]),
        (with_config(ONE, tool="diffusers"), "mlx", ["error: this is an adapter of diffusers"]),
        (with_config(ONE, unjudged=("use_bdlora",)), None, ["info: LoRA with use_bdlora"]),
        (ONE, None, []),
    ],
)
def test_another_method(facts: CheckpointFacts, serve: Any, words: list[str]) -> None:
    says("adapter_is_of_another_method", facts, *words, expect=Expect(serve=serve))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (configured(ONE, init_lora_weights="pissa_niter_4"), ["warning: was not converted"]),
        (configured(ONE, init_lora_weights="loftq"), ["warning: publish the base that LoftQ quantized"]),
        (configured(ONE, init_lora_weights="corda"), ["warning: path_initial_model_for_weight_conversion"]),
        (configured(ONE, init_lora_weights="pissa"), []),
        (configured(ONE, init_lora_weights="olora"), []),
        (configured(ONE, init_lora_weights="gaussian"), []),
        (ONE, []),
        (unjudged(configured(ONE, init_lora_weights="corda")), []),
        (configured(replace(ONE, tensors=()), init_lora_weights="corda"), []),
    ],
)
def test_an_init_that_is_not_converted(facts: CheckpointFacts, words: list[str]) -> None:
    says("init_is_not_converted", facts, *words)


# ------------------------------------------------------------------ keys


def key_facts(*names: str, **changes: Any) -> CheckpointFacts:
    facts = configured(saved([]))
    return replace(with_tensors(facts, *(TensorFacts(name, "F32", (2, 2)) for name in names)), **changes)


P = "base_model.model."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{P}q.lora_down.weight", "error: are named as diffusers or kohya-ss name them"),
        (f"{P}q.lora_a.weight", "error: are named as torchtune names them"),
        (f"{P}q.lora_a", "error: are named as MLX names them"),
        (f"{P}_orig_mod.q.lora_A.weight", "error: carry '_orig_mod.' of torch.compile"),
        (f"model.{P}q.lora_A.weight", "error: take 'model.' off the keys"),
        ("q.lora_A.weight", "error: lack the prefix base_model.model."),
        (f"{P}{P}q.lora_A.weight", "error: save_file({k.replace('base_model.model.', '', 1): v"),
        (f"{P}{P}{P}q.lora_A.weight", "error: save_file({k.replace('base_model.model.', '', 2): v"),
        (f"{P}q.lora_A", "error: lack .weight at their end"),
        (f"{P}q.lora_A.first.weight", "error: carry the adapter name 'first'"),
        (f"{P}module.q.lora_A.weight", "warning: carry 'module.' of DDP or DeepSpeed"),
        (f"module.{P}q.lora_A.weight", "error: carry 'module.' of DDP or DeepSpeed"),
    ],
)
def test_keys_that_match_nothing(name: str, words: str) -> None:
    says("key_prefix_is_wrong", key_facts(name), words)
    if name.startswith(f"{P}module."):
        says("key_prefix_is_wrong", fitted(key_facts(name)), words.replace("warning", "error"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{P}q.lora_down.weight", f"keys such as {P}q.lora_A.weight"),
        ("q.lora_B.weight", f"keys such as {P}q.lora_B.weight"),
    ],
)
def test_the_key_that_peft_would_write(name: str, expected: str) -> None:
    (found,) = told("key_prefix_is_wrong", key_facts(name))
    assert found.expected == expected


def test_long_keys_are_cut() -> None:
    (found,) = told(
        "key_prefix_is_wrong", key_facts(f"{'x' * 70}.{P}q.lora_A.weight", f"{'x' * 70}.{P}v.lora_A.weight")
    )
    assert f"carry '{'x' * 60}.' before" in found.observed
    (found,) = told("key_prefix_is_wrong", key_facts(f"{'x' * 200}.lora_A.weight"))
    assert found.observed.endswith(f": {'x' * 150}")
    assert found.expected == f"keys such as {P}{'x' * 133}"


def test_keys_that_are_there_twice() -> None:
    twice = key_facts(f"{P}q.lora_A.weight", f"{P}q.lora_A.default.weight", f"{P}v.lora_A.weight")
    says(
        "key_is_there_twice",
        twice,
        f"error: {P}q.lora_A.weight and {P}q.lora_A.default.weight are keys of the same",
    )
    says("key_is_there_twice", unjudged(twice))
    says("key_is_there_twice", key_facts(f"{P}q.lora_A.weight", f"{P}q.lora_A.x.weight"))
    says("key_is_there_twice", ONE)
    long = [f"{P}{'x' * 200}.lora_A.weight", f"{P}{'x' * 200}.lora_A.default.weight"]
    (found,) = told("key_is_there_twice", key_facts(*long))
    assert found.observed == f"{long[0][:150]} and {long[1][:150]} are keys of the same tensor"


# ------------------------------------------------------------------ factors


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (of(module("q", b=None)), ["error: lora_B is missing in 1 of 1"]),
        (of(module("q", a=None)), ["error: lora_A is missing in 1 of 1"]),
        (of(module("q"), use_dora=True), ["error: lora_magnitude_vector is missing in 1 of 1"]),
        (of(module("q", b=None), use_dora=True), ["error: lora_B is missing in 1 of 1"]),
        (of(module("q", a=None), use_dora=True), ["error: lora_A is missing in 1 of 1"]),
        (of(replace(module("q"), magnitude=tensor("q.lora_magnitude_vector", 8)), use_dora=True), []),
        (of(module("q")), []),
        (unjudged(of(module("q", b=None))), []),
        (fitted(of(module("q", b=None))), []),
        (fitted(of(module(Q, b=None)), loads=True), []),
        (fitted(of(module(Q, b=None))), ["error: lora_B is missing"]),
        (replace(key_facts("q.lora_A.weight"), adapted=(module("q", b=None),)), []),
        (replace(of(module("q", b=None)), config=None), ["error: lora_B is missing"]),
    ],
)
def test_missing_factors(facts: CheckpointFacts, words: list[str]) -> None:
    says("factor_is_missing", facts, *words)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (of(module("q")), []),
        (of(module("q", (4, 8), (8, 4))), ["error: says r=2, but the tensors have rank 4 in 1 of 1 modules"]),
        (of(module("q", (4, 8), (8, 4))), ["error: restore r=4 and the lora_alpha"]),
        (of(module("q", (4, 8), (8, 4)), rank_pattern={"v": 3}), ["error: restore r=4, rank_pattern={} and"]),
        (of(module("q", (4, 8), (8, 4)), module("v"), rank_pattern={"v": 2}), ["error: {'v': 2, 'q': 4} and"]),
        (of(module("q", (8, 2), (2, 8))), ["error: lora_A is 8x2, lora_B is 2x8: lora_A and lora_B have the rank r=2"]),
        (of(module("q", (8, 2), (2, 8))), ["error: or as if lora_A and lora_B had changed places"]),
        (of(module("q", (8, 2))), ["error: lora_A has the rank r=2 on the wrong side, as if transposed"]),
        (of(module("q", (8, 2), None)), ["error: lora_A is 8x2: lora_A has the rank"]),
        (of(module("q", (4, 8), (8, 3), rank=None)), ["error: lora_A has rank 4, but lora_B has rank 3"]),
        (of(module("q", (4, 8, 3, 3), (8, 2, 1, 1), rank=None)), []),
        (of(module("q", (4, 8), None, rank=None)), []),
        (of(module("q", (4, 8), (8, 4), rank=None)), []),
        (of(module("q", (4, 8), (8, 4)), target_parameters=["experts"]), []),
        (of(module("q", (3, 8), (8, 3)), target_parameters=["experts"]), ["error: have rank 3"]),
        (of(module("q", (1, 8), (1, 1)), init_lora_weights="pissa"), []),
        (of(module("q", (1, 8), (1, 1))), ["error: have rank 1"]),
        (of(module("q", (1, 8), (8, 1)), init_lora_weights="pissa"), ["error: have rank 1"]),
        (unjudged(of(module("q", (4, 8), (8, 4)))), []),
        (fitted(of(module("q", (4, 8), (8, 4))), loads=True), []),
        (fitted(of(module("q", (4, 8), (8, 4)))), ["error: have rank 4"]),
    ],
)  # fmt: skip
def test_ranks(facts: CheckpointFacts, words: list[str]) -> None:
    says("rank_differs_from_config", facts, *words)


def test_one_factor_alone_has_not_changed_places() -> None:
    (found,) = told("rank_differs_from_config", of(module("q", (8, 2))))
    assert found.observed.endswith("has the rank r=2 on the wrong side, as if transposed")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (plain(ONE, tensor("head.weight", 0)), ["error: 1 of 3 tensors are empty (shape 0)"]),
        (of(module("q", (2,))), ["error: 1 of 2 adapter tensors are flat (shape 2)"]),
        (of(module("q", (0,))), ["error: 1 of 2 tensors are empty (shape 0)"]),
        (of(replace(module("q"), magnitude=tensor("q.lora_magnitude_vector", 8))), []),
        (key_facts(f"{P}q.lora_A.weight"), []),
        (replace(key_facts(), tensors=()), []),
        (unjudged(plain(ONE, tensor("head.weight", 0))), []),
        (plain(ONE, tensor("q.lora_B.bias", 8)), []),
    ],
)
def test_empty_tensors(facts: CheckpointFacts, words: list[str]) -> None:
    says("tensor_is_empty", facts, *words)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (only(tensor("q.lora_A.weight", dtype="I8")), ["error: 1 of 1 adapter tensors have the dtype I8"]),
        (only(tensor("q.lora_A.weight", 0, dtype="I8")), []),
        (only(tensor("q.lora_A.weight", dtype="BF16")), []),
        (only(tensor("head.weight", dtype="I8")), []),
        (unjudged(only(tensor("q.lora_A.weight", dtype="I8"))), []),
    ],
)
def test_dtypes(facts: CheckpointFacts, words: list[str]) -> None:
    says("dtype_is_not_floating", facts, *words)


def sized_b(rms: float | None, alpha: float = 2, **values: Any) -> CheckpointFacts:
    return of(module("q", rms=rms, **values), module("v", rms=0.1), lora_alpha=alpha)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (sized_b(30.0), []),
        (
            sized_b(30.1),
            ["warning: lora_B is too large in 1 of 2 modules: its values, scaling applied, are about 30 in"],
        ),
        (sized_b(15.1, 4), ["warning: too large"]),
        (sized_b(15.1, -4), ["warning: too large"]),
        (sized_b(14.9, 4), []),
        (sized_b(99.0, nans=1), []),
        (sized_b(99.0, infinities=1), []),
        (sized_b(None), []),
        (unjudged(sized_b(99.0)), []),
        (replace(sized_b(99.0), config=None), []),
        (of(module("q", b=None)), []),
    ],
)
def test_sizes_of_factors(facts: CheckpointFacts, words: list[str]) -> None:
    says("saved_adapter_is_huge", facts, *words)


def dead(name: str, **more: Any) -> AdaptedModule:
    return module(name, zero=True, **more)


NO_MAGNITUDE = replace(module("q"), magnitude=tensor("q.lora_magnitude_vector", 8, zero=True))
NOTHING = "the adapter changes nothing there"


@pytest.mark.parametrize(
    ("facts", "expect", "words"),
    [
        (of(dead("q")), {}, [f"error: lora_B is all zero in 1 of 1 modules: {NOTHING}"]),
        (of(dead("q"), module("v")), {}, ["info: all zero in 1 of 2"]),
        (of(dead("layers.0.q"), module("layers.1.q")), {}, ["warning: in 1 of 2"]),
        (of(dead("layers.0.q"), module("layers.1.v")), {}, ["info: in 1 of 2"]),
        (of(dead("layers.0.attn.q"), module("layers.0.attn.v")), {}, ["warning: in 1 of 2"]),
        (of(dead("layers.0.mlp.q"), module("layers.0.attn.v")), {}, ["info: in 1 of 2"]),
        (of(dead("experts.0.q"), module("experts.1.q")), {}, ["info: in 1 of 2"]),
        (of(dead("vision.0.q"), module("vision.1.q")), {}, ["info: in 1 of 2"]),
        (of(dead("q"), dead("v")), {}, ["error: in 2 of 2"]),
        (of(dead("q")), {"fresh": True}, []),
        (replace(of(dead("q")), is_reference=True), {}, ["info: load the folder around this one"]),
        (replace(of(dead("q")), is_reference=True), {"fresh": False}, ["info: lora_B is all zero"]),
        (replace(of(module("q")), is_reference=True), {}, []),
        (replace(plain(ONE, tensor("head.weight", 4, 4, zero=True)), is_reference=True), {}, ["warning: 1 of 1"]),
        (of(dead("q")), {"fresh": False}, ["error: in 1 of 1"]),
        (unjudged(of(dead("q"))), {}, []),
        (of(module("q")), {}, []),
        (of(dead("q", a=(0, 8))), {}, []),
        (of(module("q", zero=True, b=(0, 2))), {}, []),
        (of(dead("q", a=None)), {}, []),
        (of(NO_MAGNITUDE), {}, ["error: the modules give out zero"]),
        (plain(ONE, tensor("head.weight", 4, 4, zero=True)), {}, ["warning: 1 of 1 weights that are saved in full"]),
        (plain(ONE, tensor("head.bias", 4, zero=True)), {}, []),
        (plain(ONE, tensor("head.weight", 0, 4, zero=True)), {}, []),
        (plain(ONE, tensor("head.weight", 4, 4)), {}, []),
        (plain(ONE, tensor("embed.token_adapter.trainable_tokens_delta", 4, 4, zero=True)), {}, []),
    ],
)  # fmt: skip
def test_what_was_not_trained(facts: CheckpointFacts, expect: dict[str, Any], words: list[str]) -> None:
    says("saved_adapter_holds_no_update", facts, *words, expect=Expect(**expect))


def marked(name: str, rows: int = 0, idle: tuple[int, ...] = (), *, size: int = 8) -> AdaptedModule:
    """A module of rank 4 whose lora_B has so many zero rows at its end, and zero columns at these ranks."""
    made = module(name, (4, 8), (size, 4), rank=4)
    assert made.a is not None
    assert made.b is not None
    of_a = Marks((True,) * 4, (True,) * 8, 0)
    of_b = Marks((True,) * size, tuple(i not in idle for i in range(4)), rows)
    a, b = (replace(t, values=replace(t.values, marks=m)) for t, m in ((made.a, of_a), (made.b, of_b)))
    return replace(made, a=a, b=b)


@pytest.mark.parametrize(
    ("facts", "expect", "words"),
    [
        (of(marked("q", idle=(2, 3)), marked("v", idle=(2, 3))), {}, ["warning: 2 of 4 ranks (columns) of lora_B"]),
        (of(marked("q", idle=(2, 3))), {}, []),
        (of(marked("q", idle=(2, 3)), marked("v", idle=(2,))), {}, []),
        (of(marked("q"), marked("v")), {}, []),
        (of(marked("q", 4), marked("v", 4)), {}, ["warning: 50 % of the rows, in one block, of lora_B"]),
        (of(marked("q", 6), marked("v", 6)), {}, ["warning: 75 % of the rows"]),
        (of(marked("q", 7), marked("v", 7)), {}, ["warning: 87.5 % of the rows"]),
        (of(marked("q", 5), marked("v", 5)), {}, []),
        (of(marked("0.q", 4), marked("1.q", 4)), {}, []),
        (of(marked("0.q", 4), marked("1.q", 4), marked("0.v", 4), marked("1.v", 6)), {}, []),
        (of(marked("q", 4), marked("v", 8, size=16)), {}, ["warning: 50 % of the rows"]),
        (of(marked("q", 4), module("v")), {}, []),
        (of(marked("q", 4), marked("v", 4)), {"fresh": True}, []),
        (unjudged(of(marked("q", 4), marked("v", 4))), {}, []),
    ],
)  # fmt: skip
def test_factors_of_which_a_part_is_there(
    facts: CheckpointFacts, expect: dict[str, Any], words: list[str]
) -> None:
    says("saved_factors_are_filled_in_part", facts, *words, expect=Expect(**expect))


def test_modules_of_which_a_part_is_there() -> None:
    facts = of(marked("0.q", 4), marked("0.v", 4), marked("0.k", 6))
    (found,) = told("saved_factors_are_filled_in_part", facts)
    assert found.where.endswith("2 modules: 0.q, 0.v")


# ------------------------------------------------------------------ what is saved in full


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (only(tensor("head.weight")), ["error: the file contains 1 tensors, none of them of LoRA"]),
        (only(tensor("0.q.base_layer.weight")), ["error: 1 base weights (base_layer) from under an adapter"]),
        (only(), ["error: no tensors: it is empty"]),
        (ONE, []),
        (only(tensor("head.weight"), target_modules=[]), []),
        (only(target_modules=[]), ["error: it is empty"]),
        (
            only(tensor("head.weight"), target_modules=[], target_parameters=["x"]),
            ["error: none of them of LoRA"],
        ),
        (replace(only(tensor("head.weight")), config=None), ["error: none of them"]),
        (unjudged(only(tensor("head.weight"))), []),
    ],
)
def test_a_file_without_an_adapter(facts: CheckpointFacts, words: list[str]) -> None:
    says("file_holds_no_adapter", facts, *words)


def extra(name: str, *shape: int, facts: CheckpointFacts = ONE, **fields: Any) -> CheckpointFacts:
    return plain(configured(facts, **fields), tensor(name, *shape))


IN_IT = "weights of the base model beside the adapter"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (extra(f"{Q}.base_layer.weight", 4, 2), [f"error: contains 1 {IN_IT}, 50% of its numbers"]),
        (extra(f"{Q}.weight"), [f"error: 1 {IN_IT}"]),
        (extra("norm.weight"), [f"info: 1 {IN_IT}"]),
        (extra("lm_head.weight"), []),
        (extra("x.token_adapter.delta"), []),
        (extra("norm.weight", modules_to_save=["norm"]), []),
        (extra("norm.weight", modules_to_save=["other"]), [f"info: 1 {IN_IT}"]),
        (extra("norm.bias", bias="all"), []),
        (extra("norm.bias"), ["info: 1"]),
        (extra("norm.weight", bias="all"), ["info: 1"]),
        (fitted(extra("norm.weight"), wanted=frozenset({f"{P}norm.weight"})), []),
        (fitted(extra("norm.weight")), ["info: 1"]),
        (fitted(plain(configured(saved(["other"])), tensor("norm.weight"))), []),
        (unjudged(extra("norm.weight")), []),
        (replace(extra("norm.weight"), config=None), []),
        (only(tensor("norm.weight")), []),
        (plain(configured(replace(key_facts("q.lora_A.weight"))), tensor("norm.weight")), []),
    ],
)
def test_weights_of_the_base(facts: CheckpointFacts, words: list[str]) -> None:
    says("base_weights_are_in_the_file", facts, *words)


def saving(
    *names: str, held: tuple[str, ...] = (), facts: CheckpointFacts = ONE, **fields: Any
) -> CheckpointFacts:
    found = configured(facts, modules_to_save=list(names) or None, **fields)
    return plain(found, *(tensor(f"{name}.weight") for name in held))


@pytest.mark.parametrize(
    ("facts", "wheres"),
    [
        (saving("head"), ["head"]),
        (saving("head", held=("head",)), []),
        (saving("head", "x", held=("head",)), ["x"]),
        (saving("classifier", "score", task_type="SEQ_CLS"), ["classifier or score"]),
        (saving("classifier", "score", task_type="SEQ_CLS", held=("score",)), []),
        (saving("qa_outputs", task_type="QUESTION_ANS"), ["qa_outputs"]),
        (saving(task_type="SEQ_CLS"), []),
        (unjudged(saving("head")), []),
        (replace(saving("head"), config=None), []),
        (saving("head", facts=only()), []),
        (fitted(saving("head", facts=configured(saved(["other"])))), []),
        (fitted(saving("head"), compared=True), []),
        (fitted(saving("head")), ["head"]),
        (fitted(saving("head"), compared=True, missing=(f"{P}x.weight", f"{P}q.lora_A.weight")), ["x"]),
        (saving(trainable_token_indices=[1]), ["trainable_token_indices"]),
        (saving(trainable_token_indices=[1], held=("x.token_adapter",)), []),
        (fitted(saving(trainable_token_indices=[1])), []),
        (saving("head", facts=key_facts("q.lora_A.weight")), []),
    ],
)
def test_modules_that_the_file_should_have(facts: CheckpointFacts, wheres: list[str]) -> None:
    assert [one.where for one in told("saved_module_is_not_in_the_file", facts)] == wheres


def test_biases_that_the_file_should_have() -> None:
    def asked(bias: str, *missing: str) -> str:
        facts = fitted(saving("head", bias=bias), compared=True, missing=missing)
        (found,) = told("saved_module_is_not_in_the_file", facts)
        return found.observed.partition(" asks for it")[0]

    assert asked("all", f"{P}q.bias") == "bias='all'"
    assert asked("all", f"{P}q.bias", f"{P}q.weight") == "modules_to_save or trainable_token_indices"
    assert asked("none", f"{P}q.bias") == "modules_to_save or trainable_token_indices"


def test_values_that_were_not_read() -> None:
    says("values_are_not_read", replace(ONE, unread=3 * 2**30), "info: the values of 3.0 GiB of tensors")
    says("values_are_not_read", ONE)


# ------------------------------------------------------------------ on a base


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (fitted(configured(saved(["x.layers.0.q"]))), ["error: no adapter key matches this base"]),
        (fitted(configured(saved(["x.layers.0.q"]))), ["error: load it on the base it was trained on"]),
        (fitted(configured(saved(["layers.0.q"]))), ["error: the base calls it 'model.layers.0.q'"]),
        (fitted(configured(saved(["0.q"]))), ["error: load it on the base it was trained on"]),
        (fitted(configured(saved(["x.y.v"]))), ["error: load it on the base it was trained on"]),
        (
            fitted(with_config(configured(saved(["x.y.v"])), base="org/b")),
            ["error: load it on 'org/b', which its"],
        ),
        (
            fitted(configured(saved(["x"])), read_by_load_adapter=True),
            ["info: load_adapter of transformers finds"],
        ),
        (fitted(ONE), []),
        (fitted(configured(saved(["x"])), loads=True), []),
        (configured(saved(["x"])), []),
        (unjudged(fitted(configured(saved(["x"])))), []),
    ],
)
def test_a_base_of_another_kind(facts: CheckpointFacts, words: list[str]) -> None:
    says("base_is_foreign", facts, *words)


@pytest.mark.parametrize(
    ("a", "b", "meant"),
    [
        ((2, 32), (32, 2), "the base calls it 'vision.layers.0.q'"),
        ((2, 64), (64, 2), "the base calls it 'text.layers.0.q'"),
        ((2, 32), (64, 2), "load it on the base it was trained on"),
        ((2, 32), None, "load it on the base it was trained on"),
    ],
)
def test_of_two_modules_at_one_place_the_one_of_the_same_sizes_is_meant(
    a: tuple[int, ...], b: tuple[int, ...] | None, meant: str
) -> None:
    known = tuple(
        BaseModule(f"{part}.layers.0.q", "Linear", n, n, None) for part, n in (("text", 64), ("vision", 32))
    )
    base = {"modules": known, "module_names": tuple(one.name for one in known)}
    says("base_is_foreign", fitted(of(module("x.layers.0.q", a, b)), base), f"error: {meant}")


HEAD = "lm_head.weight"
LOST = f"{P}model.layers.1.q.lora_A.weight"
TOWER = f"{P}model.tower.layers.0.q.lora_A.weight"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            fitted(ONE, compared=True, missing=(LOST, LOST)),
            ["error: no adapter keys for 1 of 2 adapted modules"],
        ),
        (
            fitted(ONE, compared=True, missing=(LOST,)),
            ["error: load it on the base that it was trained on, or save"],
        ),
        (
            fitted(ONE, compared=True, missing=(TOWER,)),
            [
                'error: keep it out of reach: "exclude_modules": "model\\\\.tower\\\\..*" in adapter_config.json'
            ],
        ),
        (
            fitted(ONE, compared=True, missing=(TOWER, LOST)),
            ["error: load it on the base that it was trained on, or save"],
        ),
        (
            fitted(configured(ONE, exclude_modules="x"), compared=True, missing=(TOWER,)),
            ["error: load it on the base that it was trained on, or save"],
        ),
        (fitted(ONE, compared=True, missing=(f"{P}model.layers.1.q.weight",)), []),
        (fitted(TWO, compared=True, missing=(LOST,)), []),
        (fitted(ONE, missing=(LOST,)), []),
        (unjudged(fitted(ONE, compared=True, missing=(LOST,))), []),
        (fitted(replace(ONE, adapted=()), compared=True, missing=(LOST,)), []),
    ],
)
def test_layers_that_the_base_has(facts: CheckpointFacts, words: list[str]) -> None:
    says("layers_are_missing", facts, *words)


def unused(facts: CheckpointFacts, *names: str, **fields: Any) -> CheckpointFacts:
    return fitted(facts, unused=tuple(f"{P}{name}" for name in names), compared=True, **fields)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (unused(ONE, "x.lora_A.weight"), ["error: 1 module of the file does not exist in Llama"]),
        (unused(ONE, "x.lora_A.weight", "y.lora_A.weight"), ["error: 2 modules of the file do not exist in Llama"]),
        (unused(ONE, "x.9.q.lora_A.weight"), ["error: would be dropped (layers 9)"]),
        (unused(ONE, "x.123456.q.lora_A.weight"), ["error: would be dropped"]),
        (unused(ONE, f"{Q}.lora_A.weight"), ["error: adapter keys of 1 module are not used: the configuration"]),
        (unused(ONE, f"{Q}.lora_magnitude_vector"), ["error: they hold DoRA magnitudes, and use_dora is not set"]),
        (unused(ONE, f"{Q}.lora_magnitude_vector"), ["error: of the training: use_dora=True"]),
        (unused(ONE, "x.lora_A.weight", f"{Q}.lora_A.weight"), ["error: do", "error: not used"]),
        (unused(ONE), []),
        (unused(ONE, "x.lora_A.weight", loads=True), []),
        (unused(configured(saved(["x"])), "x.lora_A.weight"), []),
        (unjudged(unused(ONE, "x.lora_A.weight")), []),
        (unused(replace(ONE, adapted=()), "x.lora_A.weight"), []),
        (unused(ONE, "x.lora_A.weight", wrapper="_orig_mod"), ["error: the live base have '_orig_mod.' of torch"]),
    ],
)  # fmt: skip
def test_tensors_that_nothing_looks_for(facts: CheckpointFacts, words: list[str]) -> None:
    says("tensors_are_not_used", facts, *words)


def test_layers_of_tensors_that_nothing_looks_for() -> None:
    names = [f"x.{number}.q.lora_A.weight" for number in range(20, 29)] + ["x.123456.q.lora_A.weight"]
    (found,) = told("tensors_are_not_used", unused(ONE, *names))
    assert found.observed.endswith(" (layers 20, 21, 22, 23, 24, 25, 26, 27)")


TARGETED = saved([Q, "model.layers.1.v"])
MAGNITUDE = replace(TARGETED, adapted=(replace(TARGETED.adapted[0], magnitude=tensor("m", 2)),))
DROPPED = "match no name in target_modules (or its layers): they would be dropped"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (configured(TARGETED), [f"error: adapter keys of 1 of 2 modules {DROPPED}"]),
        (configured(TARGETED), ["error: with target_modules=['q', 'v']"]),
        (configured(TARGETED, target_modules=["q", "v"]), []),
        (configured(TARGETED, target_modules="all-linear"), []),
        (configured(TARGETED, target_modules=["q"], target_parameters=["x"]), []),
        (configured(TARGETED, target_modules=None), []),
        (configured(TARGETED, ensure_weight_tying=True), []),
        (configured(TARGETED, target_modules=["x"], ensure_weight_tying=True), ["error: of 2 of 2 modules"]),
        (
            configured(TARGETED, target_modules=".*q"),
            ["error: restore the adapter_config.json that the adapter"],
        ),
        (
            configured(TARGETED, target_modules=["q", "v"], layers_to_transform=[0]),
            ["error: of 1 of 2 modules"],
        ),
        (
            configured(TARGETED, target_modules=["q", "v"], layers_to_transform=[0]),
            ["error: layers_to_transform=None"],
        ),
        (replace(TARGETED, config=None), []),
        (configured(MAGNITUDE), ["error: but use_dora is not set"]),
        (configured(MAGNITUDE, use_dora=True), []),
    ],
)
def test_tensors_that_no_target_names(facts: CheckpointFacts, words: list[str]) -> None:
    says("tensors_are_not_used", facts, *words)


RANKED = of(module(Q))


def misfit(
    *misfits: tuple[str, tuple[int, ...], tuple[int, ...]], facts: CheckpointFacts = RANKED, **fields: Any
) -> CheckpointFacts:
    found = fitted(
        facts,
        misfits=tuple(Misfit(f"{P}{n}", has, wants) for n, has, wants in misfits),
        compared=True,
        **fields,
    )
    return replace(found, keys={**found.keys, **{f"{P}{n}": Key.of(f"{P}{n}") for n, *_ in misfits}})


HEADED = configured(RANKED, modules_to_save=["head"])
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
OTHER = configured(replace(ONE, adapted=(replace(module(Q), configured_rank=4),)))
PACKED = configured(replace(ONE, adapted=(module(Q, (4, 8), (8, 4)),)), target_parameters=["experts"])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (misfit((A, (2, 8), (2, 9))), [f"error: {A} is 2x8, but Llama asks for 2x9 (1 of 2 tensors do not fit)"]),
        (misfit((A, (2, 8), (2, 9))), ["error: load it on the base that it was trained on"]),
        (misfit((A, (), (2, 9))), ["error: is a single number, but"]),
        (misfit((A, (0, 8), (2, 9))), []),
        (misfit((A, (2, 8), (2, 9)), facts=OTHER), []),
        (misfit(("embed.weight", (2, 8), (2, 9))), []),
        (misfit(("embed.lora_A.weight", (2, 8), (2, 9))), []),
        (misfit(("head.weight", (3, 8), (2, 8))), ["error: load it on the base that it was trained on"]),
        (misfit(("head.weight", (3, 8), (2, 8)), facts=HEADED), ["error: num_labels=3"]),
        (misfit(("head.weight", (), (2, 8)), facts=HEADED), ["error: load it on"]),
        (misfit(("x.token_adapter.delta", (3, 8), (2, 8))), ["error: restore the trainable_token_indices"]),
        (misfit((A, (2, 8), (2, 9)), ("head.weight", (3, 8), (2, 8))), ["error: 1 of 2", "error: 1 of 2"]),
        (misfit((A, (2, 8), (2, 9)), loads=True), []),
        (misfit((A, (4, 8), (4, 9)), (B, (9, 4), (8, 4)), facts=PACKED), ["error: packed experts with both"]),
        (misfit((A, (4, 8), (4, 9)), (B, (9, 4), (7, 4)), facts=PACKED), ["error: load it on"]),
        (misfit((A, (4, 8), (4, 9)), facts=PACKED), ["error: load it on"]),
        (misfit((A, (4, 8, 1), (4, 9)), (B, (9, 4), (8, 4)), facts=PACKED), ["error: load it on"]),
        (misfit((A, (4, 8), (4, 9, 1)), (B, (9, 4), (8, 4)), facts=PACKED), ["error: load it on"]),
        (misfit((A, (2, 8), (2, 9)), (B, (9, 2), (8, 2))), ["error: load it on"]),
    ],
)  # fmt: skip
def test_shapes_on_a_base(facts: CheckpointFacts, words: list[str]) -> None:
    says("shape_does_not_fit_the_base", facts, *words)


OTHER_B = B.replace(Q, "model.layers.1.q")


@pytest.mark.parametrize(
    ("misfits", "part"),
    [
        ([(B, (4, 2), (8, 2))], "1/2"),
        ([(A, (2, 2), (2, 8))], "1/4"),
        ([(B, (4, 2), (8, 2)), (OTHER_B, (4, 2), (8, 2))], "1/2"),
        ([(B, (4, 2), (8, 2)), (OTHER_B, (2, 2), (8, 2))], None),
        ([(B, (4, 2), (8, 2)), (A, (2, 4), (2, 8))], None),
        ([(B, (4, 1), (8, 2))], None),
        ([(B, (3, 2), (8, 2))], None),
        ([(B, (16, 2), (8, 2))], None),
        ([(B, (4, 2, 1), (8, 2))], None),
        ([("head.weight", (4, 2), (8, 2))], None),
    ],
)
def test_slices_of_one_rank(misfits: list[Any], part: str | None) -> None:
    (found,) = told("shape_does_not_fit_the_base", misfit(*misfits))
    assert (f"has {part} of its size" in found.fix) if part else ("slice" not in found.fix)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (misfit(("embed.weight", (110, 8), (100, 8))), ["error: the file has 110 rows for 'embed', but"]),
        (misfit(("embed.weight", (110, 8), (100, 8)), (HEAD, (110, 8), (100, 8))), ["error: 'embed' and 'lm_head'"]),
        (misfit(("embed.lora_embedding_A", (8, 110), (8, 100))), ["error: the file has 110 rows for 'embed'"]),
        (misfit(("embed.lora_embedding_B", (110, 8), (100, 8))), []),
        (misfit(("lm_head.lora_A.weight", (4, 9), (4, 8))), []),
        (misfit(("lm_head.lora_B.weight", (110, 4), (100, 4))), ["error: 110 rows for 'lm_head'"]),
        (misfit(("embed.weight", (0, 8), (100, 8))), []),
        (misfit(("embed.weight", (100, 9), (100, 8))), []),
        (misfit(("embed.weight", (), (100, 8))), []),
        (misfit(("embed.lora_embedding_A", (8,), (8, 100))), []),
        (misfit(("x.weight", (110, 8), (100, 8))), []),
        (misfit(("embed.weight", (110, 8), (100, 8)), may_be_extended=True), []),
        (replace(misfit(("embed.weight", (110, 8), (100, 8))), adapted=saved(["x"]).adapted), []),
        (replace(fitted(ONE), tokens=100), ["error: knows token 100, but the vocabulary of Llama has only 100"]),
        (replace(fitted(ONE), tokens=100), ["error: call base.resize_token_embeddings(101)"]),
        (replace(fitted(ONE), tokens=99), []),
        (replace(fitted(ONE, {"vocab_size": None}), tokens=100), []),
        (replace(misfit(("embed.weight", (110, 8), (100, 8))), tokens=105), ["error: the file has 110 rows"]),
        (replace(ONE, tokens=100), []),
    ],
)  # fmt: skip
def test_the_vocabulary(facts: CheckpointFacts, words: list[str]) -> None:
    says("vocabulary_differs", facts, *words)


@pytest.mark.parametrize(
    ("zero", "coarse", "is_told"),
    [
        (0.05, 0.5, True),
        (0.049, 0.5, False),
        (0.05, 0.49, False),
        (0.99, 1.0, True),
        (1.0, 1.0, False),  # nothing was trained
    ],
)
def test_numbers_too_small_for_float16(zero: float, coarse: float, is_told: bool) -> None:
    facts = of(module("a.q", underflow=(zero, coarse)), module("a.v"))
    words = ["warning: of its places in 1 of 2 modules"] if is_told else []
    says("saved_values_underflow", facts, *words)
    says("saved_values_underflow", unjudged(facts))
    says("saved_values_underflow", facts, expect=Expect(fresh=True))


def test_a_pattern_is_not_restored_name_by_name() -> None:
    named, written = (configured(saved([Q]), target_modules=targets) for targets in (["v"], r".*\.v"))
    tensors = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    says("tensors_are_not_used", unused(named, *tensors), "error: target_modules=['v', 'q']")
    (found,) = told("tensors_are_not_used", unused(written, *tensors))
    assert found.fix == "restore the adapter_config.json that the adapter was trained with"
