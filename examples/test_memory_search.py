"""Which LoRA step on Llama-2-7B does not fit on 24 GiB? Hypothesis searches, and shrinks what it finds.

pytest examples/test_memory_search.py -s
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import LoraHealthError, assert_fits_memory, largest_that_fits, oom_frontier
from pytest_lora.strategies import TrainingShape, lora_configs, training_shapes

LLAMA_2_7B = LlamaConfig()  # its defaults are the 7B shape; the path of a config.json does as well
SHAPES = training_shapes(quantizations=["nf4"], optimizers=["adamw_torch"], gradient_checkpointing=[False])
SEARCH = settings(derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink])


def test_the_smallest_step_that_does_not_fit() -> None:
    """In a test of your own the property stands alone, and fails with the shrunk example printed as code."""
    failed: list[tuple[LoraConfig, TrainingShape]] = []

    @SEARCH
    @given(lora_configs(targets="all-linear", variants=[]), SHAPES)
    def fits(config: LoraConfig, shape: TrainingShape) -> None:
        failed.append((config, shape))
        asked = {"batch_size": shape.batch_size, "seq_len": shape.seq_len, "quantization": "nf4"}
        assert_fits_memory(LLAMA_2_7B, config, budget="24GiB", advise=False, select=["LORA502"], **asked)
        failed.pop()

    with pytest.raises(LoraHealthError) as found:
        fits()
    print("\n" + "\n".join((str(found.value), *found.value.__notes__)))

    config, shape = failed[-1]
    assert (config.r, config.lora_dropout, shape.batch_size) == (1, 0.0, 1)
    largest = largest_that_fits(LLAMA_2_7B, config, "24GiB", vary="seq_len", quantization="nf4")
    assert shape.seq_len == largest + 1


def test_the_frontier_as_a_table() -> None:
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    table = oom_frontier(LLAMA_2_7B, config, "24GiB", ranks=[8, 64], quantization="nf4")
    print(f"\n{table}")

    batches = {(row.seq_len, row.rank): row.batch_size for row in table.rows}
    assert batches[512, 8] >= batches[4096, 8]
    assert batches[512, 8] >= batches[512, 64]
