"""Whether more or less of a metric is better, as its name says."""

from __future__ import annotations

import re

LESS = {
    *("loss", "losses", "nll", "perplexity", "ppl", "error", "errors", "err", "wer", "cer", "ter"),
    *("mse", "rmse", "mae", "mape", "bpb", "bpc", "brier", "ece", "fid"),
}
MORE = {
    *("accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "mcc", "mrr", "ndcg", "em"),
    *("bleu", "sacrebleu", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "chrf", "bertscore"),
    *("reward", "rewards"),
}
"""Names of the metrics of Hugging Face's evaluate and of lm-evaluation-harness, and of the losses of training."""


def more_is_better(metric: str) -> bool | None:
    """Whether more of a metric is better; None where its name does not say, or says both."""
    words = set(re.findall(r"[a-z]+[0-9]*", re.sub(r"([a-z])([A-Z])(?=[a-z])", r"\1 \2", metric).lower()))
    less, more = bool(words & LESS), bool(words & MORE)
    return None if less == more else more
