"""One bound for what strangers write: the work ends, or it is refused in words; no process stays behind."""

from __future__ import annotations

import base64
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import check_checkpoint, check_config, check_memory, check_model, check_recipe, check_resume
from pytest_lora import patterns as meaning
from pytest_lora.inspection.limited import LimitedProcess, LimitError, WorkError, limited, patterns
from pytest_lora.inspection.limited.patterns import patterns_kept, unmatchable
from tests.namespace import Namespace

NAMES = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(4) for part in "qkvo"] + ["a" * 60]
WIDE = "(?i)" + "".join(f"[\u0100-\uffff{chr(0x4E00 + n)}]" for n in range(3900))
ENDLESS = {
    "(a+)+$": "(a+)+b",
    "aa or a": "(?:aa|a)" * 40 + "b",
    "words": r"(\w+\.?)+!",
    "nested": "(?:(?:(?:a*)*)*)*b",
    "wide": WIDE,
    "deep": "(" * 500 + ")" * 500,
    "count": "x{4294967295}",
}
endless = pytest.mark.parametrize("pattern", ENDLESS.values(), ids=ENDLESS)
bits = st.sampled_from([*"ab.+*?|()[]^$\\", "(?:", "(?=", "\\1", "\\w", "{2,}", "{1,900}", "a|aa", ".*"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end needs no half second to show it."""
    monkeypatch.setattr(patterns, "SECONDS", 0.06)
    monkeypatch.setattr(patterns, "PATTERN_S", 0.04)


@endless
def test_a_pattern_that_takes_for_ever_is_refused_in_the_name_of_its_field(pattern: str) -> None:
    why = unmatchable({"target_modules": pattern}, NAMES)
    assert why is not None
    assert why.startswith("target_modules: matching ")
    assert len(why) < 400


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern", "rank_pattern"])
def test_texts_are_tried_as_peft_tries_them(field: str) -> None:
    assert str(unmatchable({field: {"(a+)+b": 8, "x": 4}}, NAMES)).startswith(f"{field}: ")
    assert unmatchable({field: {"(q|v)_proj": 8, "[": 4}}, NAMES) is None


def test_long_lists_and_maps_are_refused() -> None:
    conflicting = [f"x{n}.q_proj" for n in range(20_000)]
    others = [f"model.layers.{n}.q_proj" for n in range(300)]
    for field in ("target_modules", "rank_pattern", "modules_to_save"):
        assert unmatchable({field: conflicting}, others) is not None


@pytest.mark.lora_slow
def test_those_that_tools_write_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    eva = [f"model.layers.{n}.{part}" for n in range(80) for part in "abcdefg"]
    ranks = dict.fromkeys(eva, 8)  # of EVA on Llama-2-70B
    assert unmatchable({"rank_pattern": ranks}, eva) is None
    assert unmatchable({"target_modules": eva, "exclude_modules": eva[:9]}, eva) is None


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(bits, min_size=1, max_size=14).map("".join))
def test_whatever_is_let_through_ends_here_too(pattern: str) -> None:
    if unmatchable({"target_modules": pattern, "rank_pattern": {pattern: 8}}, NAMES) is None:
        for form, match, found in (
            (pattern, re.fullmatch, [name for name in NAMES if meaning.matches(pattern, name)]),
            (
                rf"(.*\.)?({pattern})$",
                re.match,
                [name for name in NAMES if meaning.deciding_key([pattern], name)],
            ),
        ):
            try:
                assert found == [name for name in NAMES if match(form, name)]
            except re.error:
                assert found == []


def test_an_expression_that_was_tried_is_not_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT compiles what it is given, which was tried before; the facts and rules take what was found then."""
    compiled: list[str] = []
    monkeypatch.setattr(meaning, "_compiled", lambda text: compiled.append(text))
    monkeypatch.setattr(meaning, "_found", {"pattern": {}, "key": {}})
    meaning._of_end.cache_clear()
    names = Namespace(tmp_path)
    written: dict[str, Any] = {
        "target_modules": r".*\.(q|v)_proj",
        "exclude_modules": r".*layers\.0\..*",
        "rank_pattern": {r"^layers\.\d\.self_attn\.q_proj": 4, r"(q|v)_proj": 2},
        "alpha_pattern": {r"layers\.\d+\..*v_proj": 8},
    }
    config = LoraConfig(r=8, lora_alpha=16, **written)
    assert check_config(config, names["base"]).findings
    path = names.adapter(**written)
    for found in (check_checkpoint(path), check_checkpoint(path, names["base"]), check_resume(path, config)):
        assert {finding.code for finding in found.errors} <= {"LORA107"}, str(found)
    check_model(get_peft_model(names["base"], config))
    assert compiled == []
    meaning._of_end.cache_clear()


def test_what_is_not_known_of_an_expression_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "_found", {"pattern": {}, "key": {}})
    monkeypatch.setattr(meaning, "MOST", 2)
    for text in ("a.", "b."):
        meaning.learn("key", text, frozenset({"ax"}), ["ax"] if text == "a." else [], True)
    assert (meaning.deciding_key(["b.", "a."], "ax"), meaning.deciding_key(["b.", "a."], "bx")) == (
        "a.",
        "b.",
    )
    meaning.learn("key", "a.", frozenset({"m.ay"}), ["m.ay"], True)
    assert meaning._found["key"]["a."].names == {"ax", "m.ay"}
    meaning.learn("key", "[", frozenset({"ax"}), [], False)
    assert list(meaning._found["key"]) == ["["], "the others are forgotten"
    assert not meaning.is_expression("[")
    assert not meaning.is_expression("(")
    assert meaning.is_expression("a.")


def test_plain_names_need_no_process() -> None:
    apart = LimitedProcess()
    assert unmatchable({"target_modules": ["q_proj", "layers.0.v_proj"]}, NAMES) is None
    assert apart._process is None
    code = (
        "from pytest_lora.inspection.limited import limited, patterns\n"
        "assert patterns.unmatchable({'target_modules': ['q_proj'] * 100}, ['a.q_proj'] * 100) is None\n"
        "assert limited._process is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_expressions_stay_compiled_for_as_long_as_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = re._MAXCACHE
    with patterns_kept():
        first = re.compile("kept0")
        for n in range(1, kept + 10):
            re.compile(f"kept{n}")
        assert re.compile("kept0") is first
    assert kept == re._MAXCACHE
    assert len(re._cache) <= kept


def test_the_process_is_kept_and_started_anew_after_it_ended() -> None:
    apart = LimitedProcess()
    try:
        apart.do("rehearse", "target_modules", "a.*", NAMES)
        process = apart._process
        apart.do("rehearse", "target_modules", "b.*", NAMES)
        assert process is not None
        assert apart._process is process
        with pytest.raises(LimitError, match=r"does not end within 0\.05 s"):
            apart.do("rehearse", "target_modules", "(a+)+b", NAMES, seconds=0.05)
        assert process.returncode is not None
        os.kill(apart._running().pid, signal.SIGKILL)  # by others: tried once more
        apart.do("rehearse", "target_modules", "c.*", NAMES)
    finally:
        apart.close()
    assert apart._process is None


def test_memory_is_limited(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems do not keep the limit of memory")
    grown = b"]" + b"2" * 25_000_000  # one list, twenty-five million times on the stack
    with pytest.raises(LimitError, match="memory"):
        limited.do("unpickle", base64.b64encode(grown).decode(), seconds=20)
    with pytest.raises(WorkError, match="UnpicklingError"):
        limited.do("unpickle", base64.b64encode(pickle.dumps(os.system)).decode())


def test_it_is_gone_with_the_process_that_asked() -> None:
    code = (
        "import os, signal, sys\nfrom pytest_lora.inspection.limited import limited\n"
        "limited.do('rehearse', 'target_modules', 'a.*', ['a'])\n"
        "print(limited._process.pid, flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for how in ("killed", "ended"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        pid = int(done.stdout)
        for _ in range(200):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"{how}: process {pid} is still there")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_each_side_of_a_fork_has_its_own() -> None:
    limited.do("rehearse", "target_modules", "a.*", NAMES)
    assert limited._process is not None
    mine, (reading, writing) = limited._process.pid, os.pipe()
    child = os.fork()
    if child == 0:
        try:
            limited.do("rehearse", "target_modules", "b.*", NAMES)
            os.write(writing, str(limited._process.pid).encode())
            limited.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert int(os.read(reading, 20)) != mine
    os.close(reading)
    limited.do("rehearse", "target_modules", "c.*", NAMES)
    assert limited._process.pid == mine


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return nn.ModuleDict({"a" * 60: nn.Linear(4, 4), "b": nn.Linear(4, 4)})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_a_configuration_is_refused_before_anything_is_matched(base: nn.Module, field: str) -> None:
    pattern = "(a+)+c"
    value: Any = {"rank_pattern": {pattern: 8}, "modules_to_save": [pattern]}.get(field, pattern)
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["b"], field: value}
    config = LoraConfig(**fields)
    (found,) = check_config(config, base).errors
    assert found.code == "LORA124"
    assert found.observed.startswith(f"TimeoutError: {field}: matching ")
    assert found.fix == f"write plain names of modules, and few of them, in {field}"
    assert getattr(config, field) == value


def test_whatever_asks_peft_is_refused_too(base: nn.Module, tmp_path: Path) -> None:
    names = Namespace(tmp_path)
    hostile = LoraConfig(r=2, target_modules=r"(\w+\.?)+!", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="config: target_modules: matching "):
        check_memory(hostile, "Qwen/Qwen2.5-0.5B", batch_size=1, seq_len=8, budget="1GiB")
    with pytest.raises(ValueError, match="config: target_modules: matching "):
        check_resume(names.adapter(), hostile)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "adapter: lora\nbase_model: Qwen/Qwen2.5-0.5B\nlora_r: 8\nlora_alpha: 16\nsequence_len: 512\n"
        "micro_batch_size: 1\nlora_target_modules: '(\\w+\\.?)+!'\n"
    )
    report = check_recipe(recipe, budget="24GiB")
    assert any("matching" in f.observed for f in report.errors), str(report)
