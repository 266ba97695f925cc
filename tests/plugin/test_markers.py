"""``@pytest.mark.lora``: merging, and errors where tests are collected."""

from __future__ import annotations

import pytest

from tests.plugin.sessions import run

WRONG = {
    "unknown": ("@pytest.mark.lora(rnk=4)", "has no field 'rnk'; did you mean 'r'?"),
    "alias": ("@pytest.mark.lora(rank=4)", "has no field 'rank'; did you mean 'r'?"),
    "near": (
        "@pytest.mark.lora(target_module='q')",
        "has no field 'target_module'; did you mean 'target_modules'?",
    ),
    "expect": (
        "@pytest.mark.lora(alpha_ration=2.0)",
        "has no field 'alpha_ration'; did you mean 'alpha_ratio'?",
    ),
    "positional": (
        "@pytest.mark.lora(16)",
        "takes fields by name, not the positional argument 16; did you mean r=16?",
    ),
    "value": ("@pytest.mark.lora(alpha_ratio='two')", "alpha_ratio must be a number, not 'two'"),
    "parameter": (
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.lora(rangs=4))])",
        "has no field 'rangs'",
    ),
}


def test_wrong_marks_are_collection_errors_that_name_argument_test_and_closest_name(
    pytester: pytest.Pytester,
) -> None:
    for name, (mark, _) in WRONG.items():
        argument = "x" if name == "parameter" else ""
        pytester.makepyfile(
            **{f"test_{name}": f"import pytest\n{mark}\ndef test_it({argument}): ...\ndef test_other(): ..."}
        )
    result = run(pytester)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=len(WRONG))
    lines = result.outlines
    for name, (_, message) in WRONG.items():
        at = next(i for i, line in enumerate(lines) if f"ERROR collecting test_{name}.py" in line)
        test = "test_it[1]" if name == "parameter" else "test_it"
        between = ": " if name == "value" else " "
        assert lines[at + 1].startswith(f"test_{name}.py::{test}: @pytest.mark.lora{between}{message}")
    result.stdout.no_fnmatch_line("*Traceback*")


MERGED = """
import pytest

pytestmark = pytest.mark.lora(r=2, lora_dropout=0.25, alpha_ratio=3.0, fresh=True)

def test_module(lora_config, lora_expect):
    assert (lora_config.r, lora_config.lora_alpha, lora_config.lora_dropout) == (2, 4, 0.25)
    assert (lora_expect.alpha_ratio, lora_expect.fresh) == (3.0, True)

@pytest.mark.lora(r=4, alpha_ratio=2.0)
class TestClass:
    def test_class(self, lora_config, lora_expect):
        assert (lora_config.r, lora_config.lora_alpha, lora_config.lora_dropout) == (4, 8, 0.25)
        assert (lora_expect.alpha_ratio, lora_expect.fresh) == (2.0, True)

    @pytest.mark.lora(r=6, lora_alpha=1)
    def test_function(self, lora_config, lora_expect):
        assert (lora_config.r, lora_config.lora_alpha, lora_config.use_rslora) == (6, 1, True)
        assert lora_expect.alpha_ratio == 2.0

@pytest.mark.lora(r=5)
class TestSubclass(TestClass):
    def test_class(self, lora_config):
        assert lora_config.r == 5

@pytest.mark.lora(r=7)
@pytest.mark.parametrize("r", [7, pytest.param(9, marks=pytest.mark.lora(r=9))])
def test_parameter(lora_config, r):
    assert lora_config.r == r

@pytest.mark.parametrize("lora_config", [3, {"r": 5, "lora_alpha": 1}, {"lora_dropout": 0.5}], indirect=True)
def test_indirect(lora_config, request):
    parameter = request.node.callspec.params["lora_config"]
    expected = {3: (3, 6, 0.25)}.get(parameter) if isinstance(parameter, int) else None
    if expected is None:
        expected = (5, 1, 0.25) if "r" in parameter else (2, 4, 0.5)
    assert (lora_config.r, lora_config.lora_alpha, lora_config.lora_dropout) == expected

def objects():
    from peft import LoraConfig

    return [LoraConfig(r=11, target_modules=["q_proj"])]

@pytest.mark.parametrize("lora_config", objects(), indirect=True)
@pytest.mark.parametrize("again", [1, 2])
def test_object(lora_config, again):
    assert (lora_config.r, lora_config.lora_alpha) == (11, 8)
    lora_config.r = 12

WRONG = [True, {"rank": 4}, {"alpha_ratio": 2.0}, {"layers_to_transform": [0]}]

@pytest.mark.parametrize("lora_config", WRONG, indirect=True)
def test_wrong_parameter(lora_config): ...

def test_defaults_of_ini(lora_config):
    assert (lora_config.use_rslora, lora_config.task_type, lora_config.target_modules) == (
        True, "CAUSAL_LM", "all-linear"
    )
"""


def test_fields_merge_from_ini_to_parameter(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nlora_config =\n    r = 32\n    use_rslora = True\n    alpha_ratio = 9.0\n")
    pytester.makepyfile(test_it=MERGED)
    result = run(pytester, "-rA")
    result.assert_outcomes(passed=13, errors=4)
    result.stdout.no_fnmatch_line("*During handling*")
    for message in (
        "test_it.py::test_wrong_parameter[[]True[]]: a parameter of lora_config is a rank, a dict of fields or a "
        "LoraConfig, not True",
        "*: the parameter of lora_config has no field 'rank'; did you mean 'r'?",
        "*: the parameter of lora_config has Expect fields: alpha_ratio",
        "*[[]lora_config3[]]: peft refuses LoraConfig(*layers_to_transform=[[]0[]]*): `layers_to_transform` cannot *",
    ):
        result.stdout.fnmatch_lines([message])


def test_unknown_field_in_ini_is_named(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nlora_config =\n    rnk = 32\n")
    pytester.makepyfile("def test_it(lora_config): ...")
    result = run(pytester)
    result.assert_outcomes(errors=1)
    assert "tox.ini, in lora_config has no field 'rnk'; did you mean 'r'?" in result.outlines
