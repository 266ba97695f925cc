"""Memory of GPU tests: limits, what is left behind, out of memory, and a CUDA that broke; on a simulated card."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch

from pytest_lora.plugin.gpu import memory
from pytest_lora.plugin.options import GPU_PROPERTY
from tests.plugin.sessions import MODES, run, session
from tests.plugin.simulated import CARD, machine
from tests.simulated_cuda import MACHINES, play

GIB = 2**30


@pytest.fixture(autouse=True)
def _card(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 24)
    pytester.makeconftest(CARD)


def section(lines: list[str], title: str) -> list[str]:
    """The lines below a title, up to the next one."""
    titles = [i for i, line in enumerate(lines) if line[:3] in ("---", "===", "___")]
    start = next(i for i in titles if f" {title} " in lines[i])
    end = next(i for i in titles if i > start)
    return lines[start + 1 : end]


def measured(pytester: pytest.Pytester) -> dict[str, dict[str, Any]]:
    """The property of each GPU test in JUnit XML."""
    return {
        str(case.get("name")): json.loads(prop.get("value", ""))
        for case in ET.parse(pytester.path / "out.xml").iter("testcase")
        for prop in case.iter("property")
        if prop.get("name") == GPU_PROPERTY
    }


def test_a_test_over_its_limit_fails_with_the_peak(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_lora.plugin.gpu.run import PREDICTION, Prediction

        LIMIT = pytest.mark.lora_vram_limit("8GiB")

        @LIMIT
        def test_over(card): card.take(9 * 2**30)

        @LIMIT
        def test_at_it(card): card.take(8 * 2**30)

        @pytest.fixture
        def batch(card): return card.take(5 * 2**30)

        @LIMIT
        def test_over_with_its_fixture(card, batch): card.take(4 * 2**30)

        @LIMIT
        def test_estimated(card, request):
            request.node.stash[PREDICTION] = Prediction(7 * 2**30, {"weights": 4 * 2**30, "activations": 3 * 2**30})
            card.take(9 * 2**30)

        @LIMIT
        def test_fails_anyway(card):
            card.take(9 * 2**30)
            assert 0, "its own failure"

        @pytest.fixture(scope="module")
        def base(card): return card.take(6 * 2**30)

        @pytest.mark.lora_gpu
        def test_makes_the_base(base): ...

        @pytest.mark.lora_vram_limit(9_000_000_000)
        def test_on_top_of_the_base(base, card): card.take(3 * 2**30)
        """
    )
    result = run(pytester, "--junit-xml=out.xml")
    result.assert_outcomes(passed=2, failed=5)
    lines = result.outlines
    over = 'peak memory of 9.0 GiB on cuda:0 is over the limit of 8.0 GiB, by @pytest.mark.lora_vram_limit("8GiB")'
    assert section(lines, "test_over") == [over]
    assert section(lines, "test_over_with_its_fixture") == [over]
    assert section(lines, "test_estimated") == [
        over,
        "the estimate of this test's peak:",
        "  weights      4.0 GiB",
        "  activations  3.0 GiB",
    ]
    assert section(lines, "test_fails_anyway")[-1].endswith("AssertionError")
    assert section(lines, "test_on_top_of_the_base")[:2] == [
        "peak memory of 9.0 GiB on cuda:0 is over the limit of 8.4 GiB, by @pytest.mark.lora_vram_limit(9000000000)",
        "  allocated before the test  6.0 GiB",
    ]
    told = measured(pytester)
    assert told["test_at_it"] == {
        "devices": ["cuda:0"],
        "peak_bytes": 8 * GIB,
        "limit_bytes": 8 * GIB,
        "predicted_bytes": None,
        "left_bytes": 0,
        "seconds": told["test_at_it"]["seconds"],
        "skipped": None,
        "broken_by": None,
    }
    assert told["test_estimated"]["predicted_bytes"] == 7 * GIB
    assert {one["left_bytes"] for one in told.values()} == {0}


LEFT = """
import pytest

KEPT = []

@pytest.mark.lora_gpu
def test_keeps(card): KEPT.append(card.take(512 * 2**20))

@pytest.mark.lora_gpu
def test_cycle(card):
    block = card.take(2**30)
    block.itself = block

@pytest.mark.lora_gpu
def test_fails(card):
    block = card.take(2**30)
    try:
        inner(card)
    except ValueError as error:
        raise KeyError from error

def inner(card):
    block = card.take(2**20)
    raise ValueError

@pytest.fixture
def broken(card):
    block = card.take(2**30)
    raise RuntimeError("set-up")

@pytest.mark.lora_gpu
def test_fails_in_setup(broken): ...

@pytest.fixture(scope="module")
def base(card):
    yield card.take(2**30)

@pytest.fixture
def by_request(request): return request.getfixturevalue("base")

@pytest.mark.lora_gpu
def test_base(by_request): ...

@pytest.mark.lora_gpu
def test_base_again(base, card): KEPT.append(card.take(100))

@pytest.fixture(params=[1, 2], scope="module")
def model(request, card):
    yield card.take(request.param * 2**20)

@pytest.mark.lora_gpu
def test_model(model): ...

def test_plain_keeps(card): KEPT.append(card.take(7))

@pytest.mark.lora_gpu
def test_clean(card):
    card.take(2**20)
    assert card.now == 2**30 + 514 * 2**20 + 107, card.now
    card.cached = 1

@pytest.mark.lora_gpu
def test_cache_is_empty(card): assert card.cached == 0
"""


@MODES
def test_what_a_test_leaves_is_told_with_its_name(pytester: pytest.Pytester, mode: str) -> None:
    pytester.makepyfile(test_it=LEFT)
    result = session(pytester, mode)
    result.assert_outcomes(passed=9, failed=1, errors=1)
    assert section(result.outlines, "GPU tests") == [
        "test_it.py::test_keeps left 512.0 MiB (536870912 bytes) allocated on cuda:0",
        "test_it.py::test_base_again left 100 B (100 bytes) allocated on cuda:0",
    ]


def test_what_lora_model_keeps_for_the_next_test_is_not_left_by_this_one(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import gc
        import torch
        from pytest_lora.plugin.gpu.memory import MEMORY, NoMemory

        class Everything(NoMemory):
            def allocated(self, ordinal):
                tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
                storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
                return sum(storages.values())

        def pytest_configure(config):
            config.stash[MEMORY] = Everything()
        """
    )
    pytester.makepyfile(
        test_it="""
        import pytest, torch

        pytestmark = pytest.mark.lora_gpu
        KEPT = []

        def test_first(lora_model, lora_batch): lora_model(**lora_batch).loss.backward()
        def test_again(lora_model, lora_batch): lora_model(**lora_batch).loss.backward()
        def test_keeps(lora_model): KEPT.append(torch.zeros(1000))

        @pytest.mark.lora(r=4)
        def test_other(lora_model): ...
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=4)
    left = [line for line in section(result.outlines, "GPU tests") if line and " B (" not in line]
    assert left == ["test_it.py::test_keeps left 3.9 KiB (4000 bytes) allocated on cuda:0"]


def test_out_of_memory_is_diagnosed_and_the_next_test_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        KEPT = []

        @pytest.mark.lora_gpu(min_vram_gb=16)
        def test_too_much(card):
            held = card.take(20 * 2**30)
            card.take(10 * 2**30)

        @pytest.mark.lora_gpu
        def test_next(card):
            assert card.now == 0
            KEPT.append(card.take(10 * 2**30))

        @pytest.mark.lora_gpu
        def test_crowded(card): card.take(20 * 2**30)

        @pytest.mark.lora_gpu(min_vram_gb=24)
        def test_wrapped(card):
            KEPT.clear()
            try:
                card.take(30 * 2**30)
            except RuntimeError as error:
                raise ValueError("the trainer gave up") from error
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=3)
    lines = result.outlines
    less = (
        "smaller batches, shorter sequences, gradient checkpointing or a base in 4 bits take less; the rank of the "
        "adapter hardly matters"
    )
    at = [i for i, line in enumerate(lines) if set(line) <= set("- GPU") and " GPU " in line]
    diagnoses = [lines[i + 1 : i + 7] for i in at]
    assert diagnoses[0][:5] == [
        "out of memory on cuda:0 (card 0, 22.4 GiB)",
        "  allocated before the test        0 B",
        "  peak of the test                 20.0 GiB",
        "  taken of cuda:0 by all processes 20.9 GiB",
        f"fix: {less}; if it needs this much, @pytest.mark.lora_gpu(min_vram_gb=23) skips it on smaller devices",
    ]
    assert diagnoses[1] == [
        "out of memory on cuda:0 (card 0, 22.4 GiB)",
        "  allocated before the test        10.0 GiB",
        "    left by test_it.py::test_next: 10.0 GiB",
        "  peak of the test                 10.0 GiB",
        "  taken of cuda:0 by all processes 10.9 GiB",
        "fix: free what the tests named above left: 10.0 GiB were taken before this test began",
    ]
    assert len(diagnoses) == 3


@MODES
def test_a_broken_cuda_is_told_once_and_stops_the_gpu_tests(pytester: pytest.Pytester, mode: str) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.lora_gpu
        def test_fine(card): card.take(1)

        @pytest.mark.lora_gpu
        def test_breaks(card): card.fail()

        @pytest.mark.lora_gpu
        @pytest.mark.parametrize("n", range(50))
        def test_more(card, n): card.take(1)

        def test_plain(): ...
        """
    )
    result = session(pytester, mode, "-rs")
    result.assert_outcomes(passed=2, failed=1, skipped=50)
    reason = "not run: CUDA is broken in this process since test_it.py::test_breaks (device-side assert)"
    assert sum(reason in line for line in result.outlines) == 1
    assert section(result.outlines, "GPU")[0] == (
        "CUDA is broken in this process now (device-side assert). GPU tests that follow in it are not run: each "
        "would fail with the same error. CUDA_LAUNCH_BLOCKING=1 shows the line that broke it."
    )
    assert section(result.outlines, "GPU tests") == [
        "test_it.py::test_breaks broke CUDA: 50 GPU tests were not run after it in that process"
    ]


BREAKS_UNSEEN = """
import pytest

@pytest.mark.lora_gpu
def test_breaks_unseen(card):
    with pytest.raises(RuntimeError):
        card.fail()

@pytest.mark.lora_gpu
@pytest.mark.xfail
def test_next(card): card.take(1)
"""


def test_a_test_that_breaks_cuda_unseen_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=BREAKS_UNSEEN)
    result = run(pytester, "-rs")
    result.assert_outcomes(failed=1, skipped=1)
    assert section(result.outlines, "test_breaks_unseen") == [
        "this test left CUDA broken: device-side assert"
    ]
    result.stdout.fnmatch_lines(["SKIPPED * not run: CUDA is broken in this process since *"])


def test_a_required_session_fails_if_a_broken_cuda_stopped_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.lora_gpu
        @pytest.mark.xfail
        def test_breaks(card): card.fail()

        @pytest.mark.lora_gpu
        def test_next(card): card.take(1)
        """
    )
    assert run(pytester).ret == 0
    result = run(pytester, "--lora-require-gpu")
    result.assert_outcomes(xfailed=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR: --lora-require-gpu: 1 not run, as CUDA was broken" in result.outlines


FAILED = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"


@pytest.mark.parametrize(
    ("raised", "lasting", "told"),
    [
        (FAILED, "CUDA error: unspecified launch failure\nCompile with ...", "unspecified launch failure"),
        (FAILED, "CUDA error: something new\nCompile with ...", "CUDA error: something new"),
        (FAILED, "", None),
        ("CUDA error: unknown error", "CUDA error: unknown error", "unknown error"),
        ("", "CUDA error: the launch timed out and was terminated", "launch timed out"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "", None),
    ],
)
def test_whether_an_error_lasts_is_asked_of_the_device(
    pytester: pytest.Pytester, raised: str, lasting: str, told: str | None
) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        pytestmark = pytest.mark.lora_gpu

        def test_breaks(card): card.fail({raised!r}, {lasting!r})
        def test_next(card): card.take(1)
        """
    )
    result = run(pytester, "-rs")
    if told is None:
        result.assert_outcomes(failed=1, passed=1)
        return
    result.assert_outcomes(failed=1, skipped=1)
    reason = f"not run: CUDA is broken in this process since *::test_breaks ({told})"
    result.stdout.fnmatch_lines([f"SKIPPED *: {reason}"])
    result.stdout.fnmatch_lines([f"CUDA is broken in this process now ({told}). GPU tests that follow *"])


def test_an_error_that_only_quotes_the_words_breaks_nothing() -> None:
    for error in (
        AssertionError("CUDA error: device-side assert triggered"),
        RuntimeError("device-side assert"),
        RuntimeError("CUDA error: out of memory"),
    ):
        assert not memory.poison(error)
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "HIP error: misaligned address",
        "CUDA error: uncorrectable ECC error encountered",
    ):
        assert memory.poison(ExceptionGroup("several", [ValueError(), RuntimeError(text)]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("MPS backend out of memory", True),
        ("the disk is out of memory", False),
    ],
)
def test_out_of_memory_has_many_names(text: str, told: bool) -> None:
    assert memory.is_out_of_memory(RuntimeError(text)) is told


def test_where_the_model_is_known_the_estimate_explains_what_ran_out(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 0.03)
    pytester.makepyfile(
        """
        import pytest
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        @pytest.fixture
        def lora_device():
            return torch.device("cpu")

        @pytest.fixture
        def lora_base_model():
            return LlamaForCausalLM(LlamaConfig(
                hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=259
            ))

        @pytest.mark.lora_gpu
        def test_step(card, lora_model, lora_batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        @pytest.mark.lora_vram_limit("1GiB")
        def test_over(card, lora_model, lora_batch): card.take(2**31)

        @pytest.mark.lora_gpu
        def test_without_a_model(card):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        """
    )
    result = run(pytester, "--lora-gpu-report")
    result.assert_outcomes(failed=3)
    at = [i for i, line in enumerate(result.outlines) if set(line) <= set("- GPU") and " GPU " in line]
    first, second = ("\n".join(result.outlines[i : i + 40]) for i in at)
    assert "a training step of LlamaForCausalLM, batch 4 x 64 tokens, r=8; peak in the" in first
    assert "peak allocated" in first
    assert "error[LORA502]: step does not fit" in first
    assert "gradient_checkpointing=True" in first.partition("what if:")[2]
    assert "a training step" not in second.partition("short test summary")[0]
    over = section(result.outlines, "test_over")
    assert over[1] == "the estimate of this test's peak:"
    assert any(line.startswith("  activations ") for line in over)
    rows = {row[0].rpartition("::")[2]: row for row in map(str.split, section(result.outlines, "GPU tests"))}
    assert rows["test_step"][-2] == "MiB"  # the predicted peak, before the seconds
    assert rows["test_without_a_model"][-2] == "-"


RESETS = """
import pytest, torch

{resets}

@pytest.mark.lora_vram_limit("2GiB")
@pytest.mark.parametrize("reset", [{names}])
def test_over(played, reset):
    played.take(30 * 2**30)
    played.take(-30 * 2**30)
    reset()
    played.take(2**30)
    played.take(-(2**30))

@pytest.mark.lora_vram_limit("2GiB")
def test_below(played):
    played.take(2**30)
    played.take(-(2**30))
"""

BY_A_SWEEP = """
def by_a_sweep():
    from pytest_lora.sweep.measure import cost_of_training
    class OnTheGpu(torch.nn.Module):
        def parameters(self, recurse=True): return iter([type("P", (), {"device": torch.device("cuda", 0)})()])
    with cost_of_training(OnTheGpu()):
        pass

def by_an_old_name():
    with pytest.warns(FutureWarning):
        torch.cuda.reset_max_memory_allocated()
"""


def test_a_peak_lasts_whoever_resets_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    played = play(monkeypatch, MACHINES["L4"])
    native = torch._C._cuda_resetPeakMemoryStats
    pytester.makeconftest(
        """
        import pytest
        from pytest_lora.plugin.gpu.memory import MEMORY, CountingMemory
        from tests.plugin import test_gpu_memory

        def pytest_configure(config): config.stash[MEMORY] = CountingMemory("cuda")

        @pytest.fixture
        def played(): return test_gpu_memory.PLAYED
        """
    )
    monkeypatch.setattr("tests.plugin.test_gpu_memory.PLAYED", played, raising=False)
    names = "torch.cuda.reset_peak_memory_stats, torch.cuda.memory.reset_peak_memory_stats, by_a_sweep, by_an_old_name"
    pytester.makepyfile(RESETS.format(resets=BY_A_SWEEP, names=names))
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=4)
    over = [line for line in result.outlines if line.startswith("peak memory of")]
    assert all(
        line.startswith("peak memory of 30.0 GiB on cuda:0 is over the limit of 2.0 GiB") for line in over
    )
    assert torch._C._cuda_resetPeakMemoryStats is native


def test_what_a_failing_test_holds_is_asked_for_nothing_that_ends_the_session(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest
        import torch

        class Untold(RuntimeError):
            def __str__(self): raise ValueError("no text")

        class Unasked:
            def __getattr__(self, name): raise ValueError("no attribute")

        @pytest.fixture
        def unasked(): return Unasked()

        @pytest.mark.lora_gpu
        def test_untold(card): raise Untold

        @pytest.mark.lora_gpu
        def test_unasked(card, unasked): raise torch.OutOfMemoryError("CUDA out of memory")

        @pytest.mark.lora_vram_limit("1GiB")
        def test_over(card, unasked): card.take(2**31)

        @pytest.mark.lora_gpu
        def test_next(card): ...
        """
    )
    result = run(pytester, "--lora-gpu-report")
    result.assert_outcomes(failed=3, passed=1)
    assert any("out of memory on cuda:0" in line for line in result.outlines)
