"""How the memory of a session grows over many tests with ``lora_model``.

    python benchmarks/lora_model_memory.py [--tests 2000] [--most 1.5] [--small]

Each test trains a step at another rank, length and batch size, so that tensors of many sizes come and go. Prints the
resident memory by hundreds of tests, and fails where the last is more than ``--most`` times that after the first
hundred, in which the largest tensors have come once. With ``--small`` the base has two layers of width 64, a tenth of
the time.
Writes benchmarks/results/lora_model_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

TESTS = """
import pytest, torch

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

from pytest_lora import assert_lora_healthy

SMALL = {small}

if SMALL:
    @pytest.fixture(scope="session")
    def lora_base_model():
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=4, vocab_size=260, max_position_embeddings=128)
        return LlamaForCausalLM(config)

RANKS = [4 + n % 29 for n in range({tests})]

@pytest.mark.parametrize("lora_config", RANKS, indirect=True, ids=map(str, range({tests})))
def test_a_step(lora_model, lora_batch, request):
    number = int(request.node.name.rpartition("[")[2][:-1])
    length, size = 16 + number % 48, 1 + number % 8
    batch = {key: value[:1, :length].repeat(size, 1) for key, value in lora_batch.items()}
    optimizer = torch.optim.AdamW([p for p in lora_model.parameters() if p.requires_grad])
    lora_model(**batch).loss.backward()
    optimizer.step()
    if number % 10 == 0:
        assert_lora_healthy(lora_model)
    if number == 9 or (number + 1) % 100 == 0 or number + 1 == {tests}:
        with open("memory.txt", "a") as file:
            print(number + 1, round(resident_mib(), 1), file=file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--most", type=float, default=1.5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        Path(place, "test_many.py").write_text(
            TESTS.replace("{tests}", str(options.tests)).replace("{small}", str(options.small))
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            "test_many.py",
        ]
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        lines = Path(place, "memory.txt").read_text().splitlines()
    resident = {int(tests): float(mib) for tests, mib in map(str.split, lines)}
    growth = round(resident[options.tests] / resident[min(100, options.tests)], 3)
    result = {
        "tests": options.tests,
        "small": options.small,
        "growth": growth,
        "growth_from_the_tenth": round(resident[options.tests] / resident[10], 3),
        "resident_mib": resident,
    }
    print(json.dumps(result, indent=1))
    (REPOSITORY / "benchmarks/results/lora_model_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(growth > options.most)


if __name__ == "__main__":
    main()
