"""What would a LoRA on Llama-2-7B cost? Answered on a laptop, without a weight and without a GPU.

pytest examples/test_rank_table.py -s
"""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from pytest_lora import rank_table

LLAMA_2_7B = LlamaConfig()  # its defaults are the 7B shape; the path of a config.json does as well


def test_rank_table_of_llama_2_7b() -> None:
    table = rank_table(LLAMA_2_7B, ranks=[4, 8, 16], target_modules=["q_proj", "v_proj"])
    print(f"\n{table}")

    assert table.total == 6_738_415_616
    assert [row.trainable for row in table.rows] == [2_097_152, 4_194_304, 8_388_608]
    assert [round(row.percent, 3) for row in table.rows] == [0.031, 0.062, 0.124]


def test_why_another_tool_prints_almost_twice_as_much() -> None:
    """In 4 bits two weights share a byte, so that a count of stored numbers sees about half the model.

    The adapter is not packed. Its share of what is stored is therefore almost twice its share of the
    parameters; nothing more is trained than before.
    """
    (row,) = rank_table(LLAMA_2_7B, ranks=[8], target_modules=["q_proj", "v_proj"]).rows

    packed = 32 * (
        4 * 4096 * 4096 + 3 * 4096 * 11008
    )  # the linear layers of 32 blocks; the rest is not packed
    stored = row.total - packed // 2 + row.trainable
    assert row.stored_percent == pytest.approx(100 * row.trainable / stored)
    assert (round(row.percent, 3), round(row.stored_percent, 3)) == (0.062, 0.12)
