"""Free memory goes back to the system now and then, where the C library can be asked for it."""

from __future__ import annotations

import platform

import pytest

from pytest_lora.plugin import free_memory
from tests.plugin.sessions import run


def test_it_is_asked_for_after_every_so_many_tests_with_a_model(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(free_memory, "_trim", lambda: lambda: asked.append(1))
    monkeypatch.setattr(free_memory, "EVERY", 2)
    monkeypatch.setattr(free_memory, "_tests", 0)
    pytester.makepyfile(
        "import pytest, torch\n"
        "@pytest.fixture(scope='session')\ndef lora_base_model():\n"
        "    return torch.nn.ModuleDict({'a': torch.nn.Linear(4, 4)})\n"
        "@pytest.fixture\ndef lora_config():\n    import peft\n    return peft.LoraConfig(r=2, target_modules=['a'])\n"
        "@pytest.mark.parametrize('n', range(5))\ndef test_model(lora_model, n): ...\n"
        "def test_plain(): ...\n"
    )
    run(pytester).assert_outcomes(passed=6)
    assert len(asked) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_can_be_asked() -> None:
    assert free_memory._trim()() in (0, 1)


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1"))
    free_memory._trim.cache_clear()
    assert free_memory._trim()() is None
    free_memory._trim.cache_clear()
