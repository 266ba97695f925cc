"""A session that does not use LoRA pays next to nothing for the installed plugin."""

from __future__ import annotations

import json

import pytest

from tests.plugin.sessions import run
from tests.plugin.simulated import machine

HEAVY = {
    "torch",
    "numpy",
    "numba",
    "transformers",
    "peft",
    "bitsandbytes",
    "hypothesis",
    "accelerate",
    "safetensors",
}

ALONE = ("-p", "no:pytest_torch")
"""A plugin of others that imports what is looked for here."""

PRINT_MODULES = """
import json, sys

def pytest_unconfigure():
    ours = [m for name, m in sys.modules.items() if name.startswith("pytest_lora.")]
    assert {type(m.__spec__.loader).__name__ for m in ours} <= {"SourceFileLoader"}, "pytest rewrites what is ours"
    print("MODULES", json.dumps(sorted(sys.modules)))
"""


def loaded(pytester: pytest.Pytester, *args: str) -> set[str]:
    result = pytester.runpytest_subprocess("-s", *ALONE, "-p", "no:xdist", *args)
    assert result.ret == 0
    line = next(line for line in result.outlines if "MODULES " in line)
    return set(json.loads(line.partition("MODULES ")[2]))


def test_a_session_without_lora_loads_at_most_five_own_modules_and_nothing_heavy(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeconftest(PRINT_MODULES)
    pytester.makepyfile(
        "import pytest\n@pytest.mark.parametrize('x', [1, 2])\ndef test_plain(x, tmp_path): ..."
    )
    modules = loaded(pytester)
    own = {name for name in modules if name.partition(".")[0] == "pytest_lora"}
    assert {"pytest_lora", "pytest_lora.plugin"} <= own
    assert len(own) <= 5, own
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    without = loaded(pytester, "-p", "no:lora")
    assert modules - without == own


def test_a_worker_of_xdist_loads_no_more(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        PRINT_MODULES.replace("import json, sys", "import json, os, sys")
        .replace('print("MODULES"', 'print(os.environ.get("PYTEST_XDIST_WORKER"), "MODULES"')
        .replace(")))", ")), file=open('modules.log', 'a'))")
    )
    pytester.makepyfile("def test_plain(): ...")
    assert pytester.runpytest_subprocess(*ALONE, "-n", "1").ret == 0
    lines = (pytester.path / "modules.log").read_text().splitlines()
    worker = json.loads(next(line for line in lines if line.startswith("gw0")).partition("MODULES ")[2])
    assert len([name for name in worker if name.partition(".")[0] == "pytest_lora"]) <= 5
    assert not {name.partition(".")[0] for name in worker} & HEAVY


def test_marks_import_nothing_heavy_before_set_up(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makeconftest(PRINT_MODULES)
    pytester.makepyfile(
        "import pytest\n@pytest.mark.lora_gpu(min_vram_gb=16)\ndef test_runs(): ...\n"
        "@pytest.mark.lora_gpu(min_vram_gb=99)\ndef test_is_skipped(): ...\n"
        "@pytest.mark.lora(alpha_ratio=2.0)\ndef test_plain(): ..."
    )
    assert not {name.partition(".")[0] for name in loaded(pytester)} & HEAVY


def test_tests_that_ask_for_nothing_get_no_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_plain(request): assert request.fixturenames == ['request']")
    assert run(pytester, *ALONE).ret == 0


def test_can_be_switched_off(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_plain(lora_device): ...")
    result = run(pytester, "-p", "no:lora")
    result.stdout.fnmatch_lines(["E       fixture 'lora_device' not found"])
