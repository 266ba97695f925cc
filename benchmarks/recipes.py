"""Damages a thousand recipes, and times whole ones: no exception, no hang, no read outside; seconds a recipe.

    python benchmarks/recipes.py [--damaged 1000] [--sessions 100] [--seed 0]

Reads are watched by an audit hook: under the temporary folder only the recipe's own folder may be opened. Writes
benchmarks/results/recipes.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

HANG = 2.0

AXOLOTL = """base_model: meta-llama/Llama-3.1-8B
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets:
  - &data
    path: data/train.jsonl
    type: alpaca
  - <<: *data
    path: data/more.jsonl
sequence_len: 2048
micro_batch_size: 1
learning_rate: 0.0002
gradient_checkpointing: true
deepspeed: ds.json
lora_model_dir: adapter
"""
OTHERS = (
    "model_name_or_path: Qwen/Qwen2.5-7B\nstage: sft\ndo_train: true\nlora_rank: 16\nlora_target: all\nbf16: true\n",
    "model_name_or_path: Qwen/Qwen2.5-7B\nuse_peft: true\ndtype: bfloat16\ndataset_name: data/train.jsonl\nlora_r: 8\n",
    "model: Qwen/Qwen2.5-7B\ntuner_type: lora\nlora_rank: 16\ndataset: [data/train.jsonl]\nmax_length: 2048\n",
    "model:\n  name: Qwen/Qwen2.5-7B\nlora:\n  r: 16\n  lora_alpha: 32\n  target_modules: [q_proj]\nlr: 1e-4\n",
)
WORDS = (
    "model_name_or_path: Qwen/Qwen2.5-7B\nuse_peft: true\ndtype: bfloat16\ndataset_name: data/x.jsonl\nlora_r: 8\n",
    "<<: *data", "9" * 40, "[" * 60, "../../etc/passwd", "/etc/passwd", "../outside", "\x00", "a: b: c", "---", "@",
)  # fmt: skip


def damaged(draw: random.Random) -> str:
    """A recipe that is cut, shuffled, nested, aliased, or huge."""
    lines = draw.choice((AXOLOTL, *OTHERS)).splitlines()
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(lines))
        key = lines[at].partition(":")[0]
        kind = draw.randrange(7)
        if kind == 0:
            lines[at] = lines[at][: draw.randint(0, len(lines[at]))]
        elif kind == 1:
            draw.shuffle(lines)
        elif kind == 2:
            lines[at] = f"{key}: {draw.choice(WORDS)}"
        elif kind == 3:
            lines.insert(at, draw.choice(WORDS))
        elif kind == 4:
            lines[at] = draw.choice((" ", "\t", "- ")) + lines[at]
        elif kind == 5:
            lines = ["outer:", *(f"  {line}" for line in lines)]
        else:
            lines.extend(
                [f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}, *k{n - 1}]" for n in range(1, draw.randint(2, 60))]
            )
    return "\n".join(lines * draw.choice((1, 1, 1, 2, 200)))


class Reads:
    """Files under a folder, but outside of another, that were opened."""

    def __init__(self, tree: Path, allowed: Path) -> None:
        self.tree, self.allowed, self.outside = str(tree), str(allowed), set[str]()

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.realpath(arguments[0])
            if path == "/etc/passwd" or (path.startswith(self.tree) and not path.startswith(self.allowed)):
                self.outside.add(path)


def fuzz(count: int, seed: int) -> dict[str, object]:
    """Judge damaged recipes, and say what went wrong."""
    from pytest_lora import check_recipe

    draw = random.Random(seed)
    failures: list[str] = []
    seconds: list[float] = []
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        inside = tree / "recipes"
        (inside / "adapter").mkdir(parents=True)
        (inside / "adapter/adapter_config.json").write_text('{"r": 8}')
        (inside / "ds.json").symlink_to(tree / "outside")
        (tree / "outside").write_text('{"zero_optimization": {"stage": 3}}')
        reads = Reads(tree, inside)
        sys.addaudithook(reads)
        recipe = inside / "recipe.yaml"
        for text in (AXOLOTL, *OTHERS):  # bases are built once a session
            recipe.write_text(text)
            check_recipe(recipe)
        for number in range(count):
            text = damaged(draw)
            recipe.write_text(text, encoding="utf-8")
            start = time.process_time()
            try:
                report = check_recipe(recipe)
            except Exception:
                failures.append(f"{number}: {traceback.format_exc(limit=-2)}")
                continue
            seconds.append(time.process_time() - start)
            silent += not report.findings and "left alone" not in report.subject
        outside = sorted(reads.outside)  # cleaning up opens the folder itself
    return {
        "damaged": count,
        "exceptions": failures,
        "longest_seconds": round(max(seconds), 3),
        "hangs": sum(one > HANG for one in seconds),
        "reads_outside": outside,
        "without_a_finding": silent,
    }


class Collections:
    """Seconds in which Python's collector walks over all objects of the process, which any code may set off."""

    def __init__(self) -> None:
        self.seconds = self._begun = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.process_time()
        else:
            self.seconds += time.process_time() - self._begun


def speed(count: int) -> dict[str, object]:
    """Seconds of a recipe, the first aside, and whether many cost in proportion."""
    from pytest_lora import check_recipe

    collections = Collections()
    gc.callbacks.append(collections)
    own: list[float] = []

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        text = AXOLOTL.replace("deepspeed: ds.json\n", "").replace("lora_model_dir: adapter\n", "")

        def judge(rank: int, **arguments: object) -> float:
            recipe.write_text(text.replace("lora_r: 16", f"lora_r: {rank}"))
            before, start = collections.seconds, time.process_time()
            check_recipe(recipe, **arguments)
            took = time.process_time() - start
            own.append(took - (collections.seconds - before))
            return took

        judge(4)
        own.clear()
        plain = [judge(8 + n) for n in range(count)]
        longest_own = max(own)
        judge(4, budget="24GiB")
        memory = [judge(8 + n, budget="24GiB") for n in range(5)]
    half = count // 2
    return {
        "recipes": count,
        "median_seconds": round(statistics.median(plain), 3),
        "longest_seconds": round(max(plain), 3),
        "longest_seconds_without_garbage_collection": round(longest_own, 3),
        "second_half_over_first": round(sum(plain[half:]) / sum(plain[:half]), 2),
        "median_seconds_with_memory": round(statistics.median(memory), 3),
        "longest_seconds_with_memory": round(max(memory), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damaged", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    result = {"speed": speed(asked.sessions), "fuzz": fuzz(asked.damaged, asked.seed)}
    (REPOSITORY / "benchmarks/results/recipes.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
