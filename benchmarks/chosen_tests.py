"""Which tests to run for a mutant: those that execute its line, the nearest files and the quickest first."""

from __future__ import annotations

import re
from pathlib import Path

from drawn_mutants import ROOT, Mutant
from executed_lines import Executed

NEAREST = (
    ("facts/figures", ("tests/facts/test_adapter_maps.py", "tests/report")),
    (
        "facts/checkpoint",
        ("tests/facts/test_saved.py", "tests/rules/test_checkpoint_rules.py", "tests/checkpoint"),
    ),
    (
        "facts/saved_",
        ("tests/facts/test_saved.py", "tests/rules/test_checkpoint_rules.py", "tests/checkpoint"),
    ),
    ("facts/served", ("tests/facts/test_saved.py", "tests/rules/test_serving_rules.py")),
    ("facts/saved_config", ("tests/checkpoint/test_resumable.py",)),
    (
        "facts/behaviour",
        ("tests/behaviour", "tests/test_shape_assertions.py", "tests/test_update_ranks.py"),
    ),
    ("facts/sweep", ("tests/facts/test_sweep.py", "tests/sweep/test_gate.py", "tests/sweep/test_choice.py")),
    (
        "facts/memory",
        ("tests/facts/test_adapter_maps.py", "tests/rules/test_memory_rules.py", "tests/memory"),
    ),
    (
        "facts/numbers",
        ("tests/memory/test_byte_sizes.py", "tests/test_counting.py", "tests/memory/test_frontier.py"),
    ),
    ("facts/history", ("tests/facts/test_history.py", "tests/rules/test_history_rules.py")),
    ("facts/curve", ("tests/facts/test_curve.py", "tests/rules/test_history_rules.py")),
    ("facts/measures", ("tests/facts/test_saved.py", "tests/plugin/test_baseline_gate.py", "tests/report")),
    ("facts/model_parts", ("tests/training/test_single_facts.py", "tests/rules/test_wrapped_models.py")),
    ("facts/batches", ("tests/training", "tests/behaviour/test_batch_law.py", "tests/rules")),
    ("facts/recipe", ("tests/recipe", "tests/rules/test_recipe_rules.py")),
    ("facts/", ("tests/facts", "tests/rules", "tests/test_training.py", "tests/test_training_trace.py")),
    ("inspection/state", ("tests/state",)),
    (
        "inspection/behaviour",
        ("tests/behaviour", "tests/rules/test_kinds_of_reports.py", "tests/strategies/test_lifecycle.py"),
    ),
    ("inspection/checkpoint", ("tests/checkpoint", "tests/rules/test_checkpoint_rules.py")),
    ("inspection/limited", ("tests/test_worker.py", "tests/test_limited.py")),
    ("inspection/memory", ("tests/memory",)),
    ("inspection/parallel_files", ("tests/recipe/test_parallel_files.py", "tests/memory/test_parallel.py")),
    ("inspection/recipe", ("tests/recipe",)),
    ("inspection/resumption", ("tests/checkpoint/test_resumable.py",)),
    ("inspection/properties", ("tests/test_shape_assertions.py",)),
    ("inspection/ranks", ("tests/runs/test_distributed.py",)),
    ("inspection/wrappers", ("tests/rules/test_wrapped_models.py", "tests/training/test_single_facts.py")),
    ("inspection/quiet", ("tests/state/test_threads.py", "tests/test_asking_peft.py")),
    (
        "inspection/training",
        (
            "tests/test_labels.py",
            "tests/training/test_single_facts.py",
            "tests/training",
            "tests/test_training.py",
            "tests/test_training_trace.py",
            "tests/test_update_ranks.py",
            "tests",
        ),
    ),
    (
        "inspection/",
        (
            "tests/test_asking_peft.py",
            "tests/test_live_facts.py",
            "tests/test_base_facts.py",
            "tests/rules",
            "tests/test_counting.py",
            "tests/test_random_configs.py",
            "tests/test_training.py",
        ),
    ),
)
"""Tests of a part of the package, the nearest first; those that mention a rule's code or name come before."""


def executing(mutant: Mutant, executed: Executed) -> set[str]:
    """The tests that execute the mutant's statement, or, of one that runs on import, lines that use what it binds."""
    if not mutant.names:
        here = executed.by_line(mutant.path)
        return set().union(*(here[line] for line in mutant.lines if line in here))
    found: set[str] = set()
    wanted = re.compile("|".join(rf"\b{name}\b" for name in mutant.names if name) or "")
    for file in [ROOT / mutant.path, *sorted((ROOT / "pytest_lora").rglob("*.py"))]:
        lines = file.read_text().splitlines()
        using = [number for number, text in enumerate(lines, 1) if wanted.search(text)]
        if using:
            here = executed.by_line(str(file.relative_to(ROOT)))
            found.update(*(here[number] for number in using if number in here))
        if file == ROOT / mutant.path and mutant.names == ("",):
            break
    return found


def chosen(mutant: Mutant, executed: Executed, budget: float) -> list[str]:
    """Tests in the order to run them: file by file, the nearest and the quickest first, within the budget."""
    near = [arguments[0] for arguments in nearest(mutant)]

    def distance(test: str) -> int:
        return next((number for number, path in enumerate(near) if test.startswith(path)), len(near))

    left, kept = budget, []
    tests = executing(mutant, executed)
    for test in sorted(tests, key=lambda one: (distance(one), executed.seconds[one], one)):
        left -= executed.seconds[test]
        if left >= 0 or not kept:
            kept.append(test)
    cost: dict[str, float] = {}
    for test in kept:
        file = test.partition("::")[0]
        cost[file] = cost.get(file, 0) + executed.seconds[test]
    files = sorted(cost, key=lambda file: (distance(file), cost[file], file))
    return sorted(kept, key=lambda one: (files.index(one.partition("::")[0]), executed.seconds[one]))


def nearest(mutant: Mutant) -> list[list[str]]:
    """Arguments of pytest for the nearest tests, one after the other."""
    inside = mutant.path.removeprefix("pytest_lora/")
    if inside.startswith("rules/"):
        text = (ROOT / mutant.path).read_text()
        code = (re.findall(r'@rule\(\s*"(\w+)"', text) or [""])[0]
        users = [
            str(f.relative_to(ROOT))
            for f in sorted((ROOT / "tests").rglob("test_*.py"))
            if code and any(word in f.read_text() for word in (code, Path(mutant.path).stem))
        ]
        return [*([path] for path in users or ["tests/rules"]), ["tests/rules/test_catalogue.py"]]
    for start, tests in NEAREST:
        if inside.startswith(start):
            return [[path] for path in tests]
    return [["tests"]]
