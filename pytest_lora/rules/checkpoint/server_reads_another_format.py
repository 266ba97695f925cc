from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter
from pytest_lora.facts.servers import SERVERS
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import TO_MLX


@rule("LORA465", severity="error", needs=ServedAdapter)
def server_reads_another_format(facts: ServedAdapter, expect: Expect) -> Iterator[Violation]:
    """The server reads a format of its own, and the folder is not in it.

    ## What it does
    mlx-lm loads adapters.safetensors, and num_layers and lora_parameters from adapter_config.json. With
    `Expect(serve="mlx")` an adapter of PEFT is named with its conversion, and so is a folder of mlx-lm that lacks one
    of these. Adapters of other tools for a server that reads PEFT are LORA415.

    ## Why is this bad?
    It cannot be loaded. Renamed files would have transposed factors, and `lora_alpha` in the place of `scale`.

    ## Example
    ```python
    report = check_checkpoint(adapter(), expect=Expect(serve="mlx"))
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(), expect=Expect(serve="transformers"))
    ```

    ## References
    - https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py
    - https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py
    """
    if expect.serve is None or not facts.saved or not SERVERS[expect.serve].own_format:
        return
    server, settings = SERVERS[expect.serve], facts.settings
    if settings is not None:
        scalings = {settings.scaling_of(module.name) for module in facts.modules}
        yield Violation(
            where=f"{facts.name}, for {server.title}",
            observed=f"the folder is an adapter of PEFT, and {server.name} reads a format of its own",
            expected="adapters.safetensors with lora_a and lora_b, and an adapter_config.json with lora_parameters",
            fix=TO_MLX.format(
                scale=f"{scalings.pop():g}" if len(scalings) == 1 else "1 (lora_b takes each scaling)"
            ),
        )
    elif facts.lacking:
        yield Violation(
            where=f"{facts.name}, for {server.title}",
            observed=f"the folder lacks {', '.join(facts.lacking)}, which {server.name} reads",
            expected="adapters.safetensors, and num_layers and lora_parameters in adapter_config.json",
            fix="copy what is missing from where mlx_lm.lora saved the adapter",
        )
