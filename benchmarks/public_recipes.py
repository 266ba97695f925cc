"""How often each rule fires on the recipes that the tools themselves publish.

    python benchmarks/public_recipes.py FOLDER...

Each folder is a checkout, or an archive of its examples with the commit in a file COMMIT, called OWNER+NAME. Every YAML
file is judged by ``check_recipe``, without a card, so that memory is not judged; files that are no recipe with LoRA are
counted apart. Writes benchmarks/results/public_recipes.json, from which the page "How often rules fire" is made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

RESULT = REPOSITORY / "benchmarks" / "results" / "public_recipes.json"


def judged(file: Path) -> dict[str, str] | str:
    """Code and severity of each rule that fires on a recipe, or why it was not judged."""
    from pytest_lora import check_recipe

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = check_recipe(file)
    except Exception as error:  # what cannot be judged is counted by its kind
        return type(error).__name__
    _, left_alone, why = report.subject.partition("(left alone: ")
    if left_alone:
        return why.removesuffix(")")
    return {finding.code: finding.severity for finding in report.findings}


def main() -> None:
    """Judge every recipe below the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    fired: Counter[str] = Counter()
    severities: dict[str, Counter[str]] = {}
    sample: list[dict[str, Any]] = []
    for folder in parser.parse_args().folders:
        files = sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])
        outcomes = [judged(file) for file in files]
        known = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        for outcome in known:
            fired.update(list(outcome))
            for code, severity in outcome.items():
                severities.setdefault(code, Counter())[severity] += 1
        sample.append(
            {
                "repository": folder.name.replace("+", "/"),
                "commit": (folder / "COMMIT").read_text().strip(),
                "files": len(files),
                "judged": len(known),
                "with_errors_or_warnings": sum(bool({*o.values()} & {"error", "warning"}) for o in known),
                "not_judged": dict(Counter(o for o in outcomes if isinstance(o, str))),
            }
        )
        print(sample[-1], flush=True)
    written = {
        "sample": sample,
        "rules": [
            {"code": code, "files": count, "severities": dict(severities[code])}
            for code, count in sorted(fired.items(), key=lambda pair: (-pair[1], pair[0]))
        ],
    }
    RESULT.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
