from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter
from pytest_lora.facts.servers import SERVERS, Server
from pytest_lora.rules import Violation, rule


@rule("LORA464", severity="error", needs=ServedAdapter)
def rank_exceeds_the_server(facts: ServedAdapter, expect: Expect) -> Iterator[Violation]:
    """The rank is above the limit that the server is started with, or no such limit exists.

    ## What it does
    Compares the highest rank of the adapter with `Expect(max_lora_rank=...)`, or else with the server's own default (16
    on vLLM, where it is a warning). vLLM takes 1, 8, 16, 32, 64, 128, 256, 320 and 512 as limits, and does not start
    with another.

    ## Why is this bad?
    The server refuses the adapter. Where several adapters are served, the highest rank of all of them counts.

    ## Example
    ```python
    path = adapter(r=32)
    report = check_checkpoint(path, expect=Expect(serve="vllm", max_lora_rank=16))
    ```

    ## Use instead
    ```python
    path = adapter(r=32)
    report = check_checkpoint(path, expect=Expect(serve="vllm", max_lora_rank=32))
    ```

    ## References
    - https://docs.vllm.ai/en/latest/features/lora.html
    - https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py
    """
    if expect.serve is None:
        return
    server, rank = SERVERS[expect.serve], facts.highest_rank
    limit = expect.max_lora_rank or server.default_rank
    if expect.max_lora_rank and server.ranks and expect.max_lora_rank not in server.ranks:
        yield Violation(
            where=f"max_lora_rank for {server.title}",
            observed=f"{server.name} does not start with {server.rank_option} {expect.max_lora_rank}",
            expected=f"one of {', '.join(map(str, server.ranks))}",
            fix=f"start it with {server.rank_option} {_limit(server, max(rank, expect.max_lora_rank))}",
        )
    elif limit and rank > limit:
        said = f"a limit of {limit}" + ("" if expect.max_lora_rank else ", its default")
        possible = not server.ranks or rank <= max(server.ranks)
        yield Violation(
            where=f"{facts.name}, for {server.title}",
            observed=f"the adapter has rank {rank}, and {server.name} has {said}: it refuses the adapter",
            expected=f"a rank of at most {limit}, or a higher limit",
            fix=f"start it with {server.rank_option or 'max_lora_rank'} {_limit(server, rank)}; of several adapters "
            "the highest rank counts"
            if possible
            else f"no limit reaches {rank}: merge the adapter into the base, or reduce its rank by an SVD of B A",
            severity=None if expect.max_lora_rank or not possible else "warning",
        )


def _limit(server: Server, rank: int) -> int:
    """The lowest limit that the server can have for a rank."""
    return next(
        (allowed for allowed in server.ranks if allowed >= rank), server.ranks[-1] if server.ranks else rank
    )
