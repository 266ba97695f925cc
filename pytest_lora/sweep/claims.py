"""What is claimed about ranks and learning rates of LoRA: by whom, and how sure it is.

Documentation and code were read in full, papers by their abstracts and summaries, as of November 2026; where a source
could not be read, ``NOT_READ`` says so. Advice quotes these claims and adds none of its own.
"""

from __future__ import annotations

from typing import NamedTuple

NOT_READ = "the source itself was not read, only others' notes on it"


class Claim(NamedTuple):
    """Something that is said about LoRA.

    Attributes:
        text: The claim.
        sources: Who says so; ``SOURCES`` has the addresses.
        sure: How sure it is, in words.
    """

    text: str
    sources: tuple[str, ...]
    sure: str

    def __str__(self) -> str:
        return f"{self.text} [{', '.join(self.sources)}: {self.sure}]"


_TRL, _TINKER, _CODE, _BLOG = "TRL", "Tinker", "Tinker's code", "LoRA Without Regret"
_LORA, _QLORA, _BIDERMAN, _RSLORA, _RATES, _BATCHES = (
    f"arXiv:{number}"
    for number in ("2106.09685", "2305.14314", "2405.09673", "2312.03732", "2602.04998", "2602.09492")
)
SOURCES = {
    _TRL: "https://huggingface.co/docs/trl/lora_without_regret",
    _TINKER: "https://tinker-docs.thinkingmachines.ai/lora-primer",
    _CODE: "https://github.com/thinking-machines-lab/tinker-cookbook (hyperparam_utils.py)",
    _BLOG: "https://thinkingmachines.ai/blog/lora/",
    _LORA: "LoRA, https://arxiv.org/abs/2106.09685",
    _QLORA: "QLoRA, https://arxiv.org/abs/2305.14314",
    _BIDERMAN: "LoRA Learns Less and Forgets Less, https://arxiv.org/abs/2405.09673",
    _RSLORA: "A Rank Stabilization Scaling Factor, https://arxiv.org/abs/2312.03732",
    _RATES: "Learning Rate Matters, https://arxiv.org/abs/2602.04998",
    _BATCHES: "Beware of the Batch Size, https://arxiv.org/abs/2602.09492",
}
"""Where each can be read."""

CAPACITY = Claim(
    "supervised training wants about as many parameters as there are completion tokens, so that the adapter holds what "
    "there is to learn",
    (_TINKER,),
    'a rough rule: its authors call it "a very rough approximation"',
)
SMALL_DATA = Claim(
    "where the data ask for less, a larger rank learns the same curve: what is too small is the data, not the rank",
    (_TINKER, _BLOG),
    "measured in one study, for the first part of training",
)
DEFAULT_RANK = Claim(
    "8 is PEFT's default, and where the LoRA paper (section 7.2) stops gaining on GPT-3",
    (_LORA,),
    "a convention",
)
LITTLE_TO_LEARN = Claim(
    "a policy gradient learns about one bit an episode, so that ranks of 1 to 32 do, whatever the size of the data",
    (_TRL, _TINKER),
    "measured by two on mathematics; a replication on one small model found full training ahead at the end",
)
LABELS = Claim(
    "a label has a few bits where a text has thousands, so that counting tokens overstates what a classifier learns; "
    "the LoRA paper (appendix D) used r=8 on GLUE",
    (_LORA,),
    f"reasoning, and one paper; {NOT_READ}",
)
NEW_KNOWLEDGE = Claim(
    "continued pretraining on billions of tokens stays behind full fine-tuning even at r=256; instruction data of that "
    "rank do not",
    (_BIDERMAN,),
    "measured in one study, on a 7B, code and mathematics",
)
ALL_LINEAR = Claim(
    "all linear layers learn more than attention alone, even at equal parameters",
    (_TRL, _TINKER, _BIDERMAN),
    "measured by two groups",
)
ALPHA = Claim(
    "how alpha should follow the rank is disputed: fixed, which divides by the rank and leaves the best rate where it "
    "is (TRL, Tinker); twice the rank (2405.09673); or divided by the square root of the rank (rsLoRA, 2312.03732)",
    (_TRL, _TINKER, _BIDERMAN, _RSLORA),
    "disputed; state yours, and compare rates at equal rate x scaling",
)
TEN_TIMES = Claim(
    "the best rate is about ten times that of full fine-tuning",
    (_TRL, _CODE, _BLOG),
    "measured in one study and used by two; the text of Tinker's primer still says 20 to 100 times, its code 10",
)
FIFTEEN_TIMES = Claim(
    "in runs of about a hundred steps it is nearer to fifteen times, as B starts at zero",
    (_BLOG,),
    f"one study; {NOT_READ}",
)
SWEPT_RATES = Claim(
    "of 28 models in supervised training, 3 of the 4 below 5 billion parameters were best at 1e-3, and 16 of the 24 "
    "above at 3e-4 or 4e-4",
    (_CODE,),
    "measured by one, with one data set and a batch of 128",
)
QLORA_RATES = Claim(
    "QLoRA took 2e-4 up to 13B and 1e-4 above (table 9)",
    (_QLORA,),
    f"a convention; {NOT_READ}",
)
RL_RATES = Claim(
    "GRPO with r=1 ran at 1e-5 where full fine-tuning had 1e-6, and at 5e-5 on a 0.6B",
    (_TRL,),
    "what their runs used, no sweep",
)
PRETRAINING_RATES = Claim(
    "rates from 1e-5 to 5e-4 are worth sweeping, the highest that stays stable is best",
    (_BIDERMAN,),
    "measured in one study",
)
SWEEP = Claim(
    "rates decide more than variants of LoRA do: at its best rate each comes within 1 to 2 % of the others",
    (_RATES,),
    "measured in one study over four to nine variants",
)
LARGE_BATCH = Claim(
    "batches above 32 cost LoRA more than full fine-tuning, and no rank mends that",
    (_TRL, _TINKER, _BATCHES),
    'measured in one study, "in some scenarios"; 2602.09492 finds that the batch decides comparisons of variants',
)
