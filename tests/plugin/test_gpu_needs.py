"""``@pytest.mark.lora_gpu``: where tests run, why they are skipped, and what a GPU job requires."""

from __future__ import annotations

import json
import os

import pytest

from pytest_lora.plugin.session_options import LoraOptions
from tests.forked import run_forked
from tests.plugin.sessions import run
from tests.plugin.simulated import CARD, GB, machine, named_machine, shared
from tests.plugin.test_startup import ALONE

TESTS = """
import pytest

@pytest.mark.lora_gpu
def test_any(): ...

@pytest.mark.lora_gpu(min_vram_gb=16)
def test_16_gb(): ...

@pytest.mark.lora_gpu(min_vram_gb=40)
def test_40_gb(): ...

@pytest.mark.lora_gpu(count=2)
def test_two(): ...

@pytest.mark.lora_gpu(min_vram_gb=40, count=2, capability=(9, 0))
def test_all(): ...

@pytest.mark.lora_gpu(capability="9.0")
def test_capability(): ...

@pytest.mark.lora_vram_limit("8GiB")
def test_limited(): ...

def test_plain(): ...
"""


def reasons(result: pytest.RunResult) -> list[str]:
    lines = [line for line in result.outlines if line.startswith("SKIPPED")]
    return [line.partition(": ")[2] for line in lines]


def test_reasons_say_what_was_needed_and_what_was_found(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(test_it=TESTS)
    result = run(pytester, "-rs")
    result.assert_outcomes(passed=4, skipped=4)
    assert reasons(result) == [
        "needs 40 GB on one device; cuda:0 has 24 GB",
        "needs 2 devices; there is 1: cuda:0",
        "needs 40 GB and compute capability 9.0 on each of 2 devices; there is 1: cuda:0 has 24 GB and compute "
        "capability 8.9",
        "needs compute capability 9.0 on one device; cuda:0 has compute capability 8.9",
    ]


def test_a_machine_with_all_of_it_skips_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 80, 80, capability=(9, 0))
    pytester.makepyfile(test_it=TESTS)
    run(pytester, "--lora-require-gpu").assert_outcomes(passed=8)


@pytest.mark.parametrize(
    ("total", "asked", "runs"), [(15.84, 16, True), (23.66, 24, True), (42.4, 40, True), (22.5, 24, False)]
)
def test_a_card_counts_as_what_it_was_sold_with(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, total: float, asked: int, runs: bool
) -> None:
    machine(monkeypatch, total)
    pytester.makepyfile(f"import pytest\n@pytest.mark.lora_gpu(min_vram_gb={asked})\ndef test_it(): ...")
    result = run(pytester, "-rs")
    result.assert_outcomes(passed=int(runs), skipped=int(not runs))
    assert runs or reasons(result) == ["needs 24 GB on one device; cuda:0 has 22.5 GB"]


@pytest.mark.parametrize(
    ("kind", "args", "capability", "found"),
    [
        (
            "cuda",
            ["--lora-device", "cpu"],
            (9, 0),
            "needs a GPU; there is none: --lora-device cpu rules them out",
        ),
        (
            "cuda",
            ["--lora-device", "xpu"],
            (9, 0),
            "needs a GPU; there is none: the devices are of kind cuda, and --lora-device is xpu",
        ),
        (
            "cuda",
            ["--lora-device", "cuda:1"],
            (9, 0),
            "needs a GPU; there is none: --lora-device cuda:1, and there are 1",
        ),
        ("xpu", [], None, "needs compute capability 8.0 on one device; xpu:0 has no compute capability"),
        ("mps", [], None, "needs compute capability 8.0 on one device; mps:0 has no compute capability"),
        ("cuda", [], None, "needs compute capability 8.0 on one device; cuda:0 has no compute capability"),
    ],
)
def test_other_devices_answer_sensibly(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    args: list[str],
    capability: tuple[int, int] | None,
    found: str,
) -> None:
    machine(monkeypatch, 24, kind=kind, capability=capability)
    pytester.makepyfile(
        "import pytest\n@pytest.mark.lora_gpu(min_vram_gb=8)\ndef test_memory(): ...\n"
        "@pytest.mark.lora_gpu(capability=(8, 0))\ndef test_capability(): ..."
    )
    result = run(pytester, "-rs", *args)
    result.assert_outcomes(**({"skipped": 2} if args else {"passed": 1, "skipped": 1}))
    assert set(reasons(result)) == {found}


def test_a_limit_is_not_judged_where_nobody_counts(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24, kind="mps", capability=None)
    pytester.makepyfile("import pytest\n@pytest.mark.lora_vram_limit('8GiB')\ndef test_it(): ...")
    result = run(pytester, "-rs")
    assert reasons(result) == ["needs a GPU whose peak memory torch counts; for mps it does not"]


def test_a_device_can_be_chosen(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, 80)
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu(min_vram_gb=40)\ndef test_it(): ...")
    result = run(pytester, "-rs")
    assert reasons(result) == [
        "needs 40 GB on one device; cuda:0 has 16 GB (cuda:1 would do: --lora-device cuda:1)"
    ]
    run(pytester, "--lora-device", "cuda:1").assert_outcomes(passed=1)


def test_hidden_devices_do_not_count(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 16, 80)
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu(min_vram_gb=40)\ndef test_it(): ...")
    for visible, reason in (
        ("0", "needs 40 GB on one device; cuda:0 has 16 GB"),
        ("1", None),
        ("1,0", None),
        ("", "needs a GPU; there is none: CUDA_VISIBLE_DEVICES is ''"),
        ("-1", "needs a GPU; there is none: CUDA_VISIBLE_DEVICES is '-1'"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        result = run(pytester, "-rs")
        assert reasons(result) == ([reason] if reason else [])


def test_without_any_gpu_torch_says_why(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or torch.version.cuda:
        pytest.skip("this torch knows CUDA")
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...")
    result = run(pytester, "-rs")
    assert reasons(result) == [f"needs a GPU; there is none: torch {torch.__version__} is built without CUDA"]


def test_nothing_is_judged_at_import_or_collection(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_LORA_HARDWARE", raising=False)
    pytester.makepyfile(test_it=TESTS)
    pytester.makeconftest(
        "import sys\ndef pytest_collection_finish():\n"
        "    print('LOADED', sorted({'torch', 'pynvml'} & set(sys.modules)))"
    )
    result = pytester.runpytest_subprocess("-s", "-k", "any or plain", *ALONE)
    result.stdout.fnmatch_lines(["*LOADED []*"])


def test_required_gpus_fail_instead_of_skipping(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(
        test_it=TESTS + "\n@pytest.mark.skip(reason='own')\n@pytest.mark.lora_gpu(min_vram_gb=99)\n"
        "def test_own_skip(): ...\n@pytest.mark.lora_slow\n@pytest.mark.lora_gpu\ndef test_slow(): ..."
    )
    result = run(pytester, "--lora-require-gpu", "-rs")
    result.assert_outcomes(passed=4, errors=4, skipped=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "--lora-require-gpu: needs 40 GB on one device; cuda:0 has 24 GB" in result.outlines
    result.stdout.no_fnmatch_line("*no GPU test ran*")


NONE_RAN = {
    "none": "def test_plain(): ...",
    "skipped": "@pytest.mark.lora_gpu\n@pytest.mark.skip\ndef test_it(): ...\ndef test_plain(): ...",
    "skips_itself": "@pytest.mark.lora_gpu\ndef test_it(): pytest.skip('by itself')\ndef test_plain(): ...",
}


def test_a_required_session_that_ran_no_gpu_test_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(**{f"test_{name}": f"import pytest\n{tests}" for name, tests in NONE_RAN.items()})
    for name in NONE_RAN:
        assert run(pytester, f"test_{name}.py").ret == 0
        result = run(pytester, f"test_{name}.py", "--lora-require-gpu")
        assert result.ret == pytest.ExitCode.TESTS_FAILED, name
        assert "ERROR: --lora-require-gpu: no GPU test ran" in result.outlines
    result = run_forked(pytester, "--lora-require-gpu", "-n", "1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR: --lora-require-gpu: no GPU test ran" in result.outlines


def test_requiring_fails_an_empty_session_and_passes_one_that_ran(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(test_it=TESTS)
    assert run(pytester, "--lora-require-gpu", "-k", "test_any").ret == 0
    assert run_forked(pytester, "--lora-require-gpu", "-k", "test_any", "-n", "1").ret == 0
    assert run(pytester, "--lora-require-gpu", "-k", "nothing").ret == pytest.ExitCode.TESTS_FAILED
    assert run(pytester, "--lora-require-gpu", "--collect-only").ret == 0


def test_marks_merge_argument_by_argument(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.lora_gpu(min_vram_gb=40)

        def test_module(): ...

        @pytest.mark.lora_gpu(count=2)
        def test_both(): ...

        @pytest.mark.lora_gpu(min_vram_gb=8)
        def test_closest(): ...

        @pytest.mark.lora_gpu(min_vram_gb=None)
        def test_none(): ...
        """
    )
    result = run(pytester, "-rs")
    result.assert_outcomes(passed=2, skipped=2)
    assert reasons(result) == [
        "needs 40 GB on one device; cuda:0 has 24 GB",
        "needs 40 GB on each of 2 devices; there is 1: cuda:0 has 24 GB",
    ]


WRONG = {
    "typo": ("@pytest.mark.lora_gpus", "there is no marker 'lora_gpus'; did you mean 'lora_gpu'?"),
    "typo_of_limit": (
        "@pytest.mark.lora_vram_limits('8GiB')",
        "there is no marker 'lora_vram_limits'; did you mean 'lora_vram_limit'?",
    ),
    "typo_of_slow": ("@pytest.mark.lora_slwo", "there is no marker 'lora_slwo'; did you mean 'lora_slow'?"),
    "argument": (
        "@pytest.mark.lora_gpu(min_vram=4)",
        "@pytest.mark.lora_gpu has no argument 'min_vram'; did you mean 'min_vram_gb'?",
    ),
    "near": (
        "@pytest.mark.lora_gpu(cuont=4)",
        "@pytest.mark.lora_gpu has no argument 'cuont'; did you mean 'count'?",
    ),
    "positional": (
        "@pytest.mark.lora_gpu(16)",
        "@pytest.mark.lora_gpu takes arguments by name, not the positional 16; did you mean min_vram_gb=16?",
    ),
    "memory": (
        "@pytest.mark.lora_gpu(min_vram_gb='16GB')",
        "@pytest.mark.lora_gpu: min_vram_gb must be a number of GB (10**9 bytes) on each device, not '16GB'",
    ),
    "no_memory": (
        "@pytest.mark.lora_gpu(min_vram_gb=0)",
        "@pytest.mark.lora_gpu: min_vram_gb must be greater than 0, not 0",
    ),
    "count": (
        "@pytest.mark.lora_gpu(count=1.5)",
        "@pytest.mark.lora_gpu: count must be a whole number of devices, 1 or more, not 1.5",
    ),
    "capability": (
        "@pytest.mark.lora_gpu(capability=80)",
        '@pytest.mark.lora_gpu: capability must be as in (8, 0) or "8.0", not 80',
    ),
    "limit": (
        "@pytest.mark.lora_vram_limit('8')",
        'the limit of @pytest.mark.lora_vram_limit must carry a unit: "8GiB" (or "8GB"), got "8"',
    ),
    "no_limit": (
        "@pytest.mark.lora_vram_limit",
        '@pytest.mark.lora_vram_limit takes one size, as in lora_vram_limit("8GiB")',
    ),
    "slow": ("@pytest.mark.lora_slow(60)", "@pytest.mark.lora_slow takes no arguments, and got 60"),
}


def test_wrong_marks_are_collection_errors_that_name_the_argument(pytester: pytest.Pytester) -> None:
    for name, (mark, _) in WRONG.items():
        pytester.makepyfile(
            **{f"test_{name}": f"import pytest\n{mark}\ndef test_it(): ...\ndef test_other(): ..."}
        )
    result = run(pytester)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=len(WRONG), warnings=result.parseoutcomes().get("warnings", 0))
    lines = result.outlines
    for name, (_, message) in WRONG.items():
        at = next(i for i, line in enumerate(lines) if f"ERROR collecting test_{name}.py" in line)
        assert lines[at + 1] == f"test_{name}.py::test_it: {message}"
    result.stdout.no_fnmatch_line("*Traceback*")


def test_markers_of_others_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    lora_gpux: somebody's own")
    pytester.makepyfile(
        "import pytest\n@pytest.mark.lora_gpux\n@pytest.mark.lora_experiments\ndef test_it(): ..."
    )
    run(pytester).assert_outcomes(passed=1, warnings=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "cuda:", "CUDA"])
def test_devices_that_do_not_exist_are_usage_errors(pytester: pytest.Pytester, device: str) -> None:
    message = f"--lora-device: '{device}' is none of auto, cpu, cuda, cuda:N, xpu, mps"
    with pytest.raises(pytest.UsageError, match=message):
        LoraOptions.from_config(pytester.parseconfig("--lora-device", device))


def test_the_device_of_the_fixtures_follows_the_option(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24, 24)
    pytester.makepyfile(
        "import os\ndef test_it(lora_device): assert str(lora_device) == os.environ['EXPECTED']"
    )
    for device, expected in (("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        monkeypatch.setenv("EXPECTED", expected)
        run(pytester, "--lora-device", device).assert_outcomes(passed=1)
    result = run(pytester, "--lora-device", "cuda:2")
    assert "--lora-device cuda:2: there are 2" in result.outlines
    for kind in ("xpu", "mps"):
        machine(monkeypatch, 24, kind=kind, capability=None)
        monkeypatch.setenv("EXPECTED", f"{kind}:0")
        run(pytester, "--lora-device", kind).assert_outcomes(passed=1)
    result = run(pytester, "--lora-device", "cuda")
    assert (
        "--lora-device cuda: there is none: the devices are of kind mps, and --lora-device is cuda"
        in result.outlines
    )
    machine(monkeypatch)
    result = run(pytester, "--lora-device", "cuda")
    assert "--lora-device cuda: there is none: the test says so" in result.outlines


UNMARKED = """
import pytest

def test_on_the_fixtures(lora_model, card): card.take(2**20)

class TestElsewhere:
    @pytest.fixture(scope="session")
    @classmethod
    def lora_device(cls):
        import torch
        return torch.device("cpu")

    def test_on_a_device_of_its_own(self, lora_model): ...

def test_plain(card): card.take(1)
"""


@pytest.mark.parametrize("machine_is", ["cuda", "mps", "none"])
def test_a_test_whose_fixtures_are_on_a_gpu_is_a_gpu_test_without_asking(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, machine_is: str
) -> None:
    machine(
        monkeypatch, *([] if machine_is == "none" else [24]), kind="mps" if machine_is == "mps" else "cuda"
    )
    pytester.makeconftest(CARD)
    pytester.makepyfile(test_it=UNMARKED)
    result = run(pytester, "--lora-gpu-report")
    result.assert_outcomes(passed=3)
    rows = [line.split()[:2] for line in result.outlines if " cuda:0 " in line or " mps:0 " in line]
    assert rows == ([["test_it.py::test_on_the_fixtures", "cuda:0"]] if machine_is == "cuda" else [])


@pytest.mark.lora_slow
def test_unmarked_tests_share_a_card_under_xdist(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24, 24)
    log = shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        test_own="import pytest, torch\n@pytest.fixture(scope='session')\n"
        "def lora_base_model(lora_device): return torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "@pytest.mark.lora(target_modules=['0'])\ndef test_own(lora_model): ...",
        test_built_in="def test_built_in(lora_model): ...",
    )
    result = run_forked(pytester, "-n", "1", "test_own.py", "test_built_in.py")
    result.assert_outcomes(passed=2)
    held = {e["who"]: e["shares"] for e in map(json.loads, log.read_text().splitlines())}
    assert held == {
        "test_own.py::test_own": {"cuda:0": 24 * GB},
        "test_built_in.py::test_built_in": {"cuda:0": 2 * GB},
    }


SKIPPED_ON = {
    "H200": {"test_two", "test_all"},
    "L4": {"test_40_gb", "test_two", "test_all", "test_capability"},
    "two L4": {"test_40_gb", "test_all", "test_capability"},
    "MIG": {"test_40_gb", "test_two", "test_all"},
    "ROCm": {"test_two", "test_all", "test_capability"},
    "MPS": {"test_40_gb", "test_two", "test_all", "test_capability", "test_limited"},
}


@pytest.mark.parametrize("name", SKIPPED_ON)
def test_every_machine_runs_what_it_can(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    named_machine(monkeypatch, name)
    pytester.makepyfile(test_it=TESTS)
    result = run(pytester, "-v")
    skipped = {
        line.split("::")[1].split()[0] for line in result.outlines if " SKIPPED" in line and "::" in line
    }
    assert skipped == SKIPPED_ON[name]
    result.assert_outcomes(passed=8 - len(skipped), skipped=len(skipped))


@pytest.mark.lora_slow
@pytest.mark.parametrize(
    ("name", "devices"), [("two L4", {"cuda:0", "cuda:1"}), ("MIG", {"cuda:0", "cuda:1"})]
)
def test_workers_of_every_machine_get_a_device_each(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, devices: set[str]
) -> None:
    named_machine(monkeypatch, name)
    shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        test_it="import pytest, time\n@pytest.mark.lora_gpu\n@pytest.mark.parametrize('n', range(4))\n"
        "def test_it(n): time.sleep(0.5)"
    )
    result = run_forked(pytester, "-n", "2", "--lora-require-gpu", "--lora-gpu-report")
    result.assert_outcomes(passed=4)
    assert {line.split()[1] for line in result.outlines if line.startswith("test_it.py::")} == devices


def test_a_torch_that_does_not_load_fails_the_test_and_not_the_session(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_LORA_HARDWARE", raising=False)
    (pytester.path / "torch.py").write_text("raise SystemError('bad call flags')")
    pytester.makepyfile("def test_it(lora_model): ...\ndef test_plain(): ...")
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    result = pytester.runpytest_subprocess(*ALONE)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*SystemError: bad call flags*"])
