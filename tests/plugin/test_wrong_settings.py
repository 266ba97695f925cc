"""Wrong options, fixtures and marks end in one line that names them, also where warnings are errors."""

from __future__ import annotations

import pytest

from tests.plugin.sessions import run

LONG = "9" * 5_000
OPTIONS = {
    "--lora-ranks": (LONG, "4,\u00b2", "0", "4,4"),
    "--lora-card": (LONG, f"{LONG}x80GiB", "00x80GiB", f"{LONG}GiB"),
    "--lora-device": ("nonsense",),
    "--lora-model": (LONG, "a\0b", "~nobody-of-this-name/x"),
    "--lora-base": (LONG,),
    "--lora-adapters": (LONG, "no/such/folder"),
    "--lora-recipes": (LONG, "no/such/folder"),
    "--lora-report": (f"{LONG}.md", "report.pdf"),
    "--lora-baseline": (LONG,),
    "--lora-select": (LONG,),
    "--lora-ignore": ("\x1b[2J",),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_option_is_one_line_that_names_it(pytester: pytest.Pytester, option: str) -> None:
    pytester.makepyfile(test_it="def test_it(lora_expect): pass")
    for value in OPTIONS[option]:
        result = run(pytester, f"{option}={value}")
        said = [line for line in (*result.errlines, *result.outlines) if option in line]
        assert result.ret == pytest.ExitCode.USAGE_ERROR, value[:20]
        assert said, (result.errlines, result.outlines)
        assert all(len(line) < 500 and line.isprintable() for line in said)
        assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


WRONG_FIXTURES = """
import pytest
from peft import IA3Config, LoraConfig

class TestOfOwn:
    @pytest.fixture(params=[{"r": 4}, None, IA3Config(target_modules=["q_proj"], feedforward_modules=[]), LoraConfig])
    def lora_config(self, request):
        return request.param

    def test_it(self, lora_model):
        pass

    def test_sweep(self, lora_rank_sweep):
        pass

WRONG = [10**400, -1, [4], {1: 2}]
WRONG += [{"r": 10**400}, {"lora_alpha": 10**400}, {"rank_pattern": 3}, {"target_modules": "("}]

@pytest.mark.parametrize("lora_config", WRONG, indirect=True, ids=str)
def test_parameter(lora_model):
    pass

class TestBase:
    @pytest.fixture
    def lora_base_model(self):
        return None

    def test_it(self, lora_model):
        pass

    def test_sweep(self, lora_rank_sweep):
        pass

def test_sound(lora_model, lora_batch):
    pass
"""


def test_what_fixtures_cannot_be_made_of_is_named_also_where_warnings_are_errors(
    pytester: pytest.Pytester,
) -> None:
    """PEFT and transformers warn of calls of ours; the session above would else fail at those."""
    pytester.makepyfile(test_it=WRONG_FIXTURES)
    result = run(pytester, "-W", "error", "--tb=short")
    result.assert_outcomes(passed=1, errors=18)
    errors = [line for line in result.outlines if "lora_config" in line or "lora_base_model" in line]
    assert len([line for line in errors if "must return a peft.LoraConfig, not" in line]) >= 8
    assert len([line for line in errors if "lora_config: PEFT refuses it on this" in line]) >= 5
    result.stdout.fnmatch_lines(["*the fixture lora_base_model must return a torch.nn.Module, not NoneType*"])
    result.stdout.no_fnmatch_line("*.py:*: in *")


SUBTESTS = """
import unittest

class TestParts(unittest.TestCase):
    def test_parts(self):
        for number in range(4):
            with self.subTest(number=number):
                self.assertEqual(number, 9)

def test_own(subtests, lora_model):
    from pytest_lora import assert_lora_healthy
    with subtests.test("healthy"):
        assert_lora_healthy(lora_model)
    for number in range(2):
        with subtests.test("part"):
            assert number == 9

def test_fine(subtests):
    with subtests.test("whole"):
        pass
"""


@pytest.mark.skipif(not hasattr(pytest, "Subtests"), reason="pytest itself has subtests from version 9 on")
def test_subtests_that_fail_are_in_the_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=SUBTESTS)
    run(pytester, "--lora-report=report.md")
    lines = (pytester.path / "report.md").read_text().splitlines()
    failures = [line.partition("`: ") for line in lines if line.startswith("- `test_it.py::")]
    assert [(name[3:], said) for name, _, said in failures] == [
        *(
            (f"test_it.py::TestParts::test_parts (number={number})", f"AssertionError: {number} != 9")
            for number in range(4)
        ),
        ("test_it.py::TestParts::test_parts", "contains 4 failed subtests"),
        ("test_it.py::test_own [part]", "assert 0 == 9"),
        ("test_it.py::test_own [part] #2", "assert 1 == 9"),
        ("test_it.py::test_own", "contains 2 failed subtests"),
    ]
    assert "- tests: 8 failed, 1 passed" in lines
