"""Writes the keys that recipes of each tool may hold, read from the tools' own sources; nothing is imported.

    python benchmarks/known_keys.py AXOLOTL LLAMAFACTORY TRL MS_SWIFT TRANSFORMERS OLD_TRANSFORMERS ACCELERATE

Each argument is a folder with the sources of that package, followed by ``=`` and the version that is written beside the
keys (``/src/axolotl=0.17``). Fields of dataclasses and pydantic models are keys, those of their bases too; the words
that a field takes are those of its ``Literal``, of its enumeration, or of ``choices`` in its metadata. What
OLD_TRANSFORMERS has and TRANSFORMERS has no more is listed as removed.
"""

import ast
import json
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "pytest_lora/inspection/recipe/known_keys.json"

RENAMED = {
    "axolotl": {
        "gradient_checkpoint": "gradient_checkpointing",
        "lora_rank": "lora_r",
        "max_seq_len": "sequence_len",
    },
    "llamafactory": {"evaluation_strategy": "eval_strategy"},
    "trl": {
        "torch_dtype": "dtype",
        "max_seq_length": "max_length",
        "evaluation_strategy": "eval_strategy",
        "warmup_ratio": "warmup_steps",
        "dataset_mixer": "dataset_mixture",
        "num_epochs": "num_train_epochs",
    },
    "ms-swift": {"train_type": "tuner_type", "sft_type": "tuner_type", "quantization_bit": "quant_bits"},
}
"""What was renamed, and what is commonly written for something else; no source says it in a form that can be read."""

TOOLS = {
    "axolotl": ("AxolotlInputConfig",),
    "llamafactory": (
        "ModelArguments",
        "DataArguments",
        "TrainingArguments",
        "FinetuningArguments",
        "GeneratingArguments",
        "MegatronBridgeArguments",
        "_KTransformersRuntimeArguments",
    ),
    "trl": (
        "ScriptArguments",
        "ModelConfig",
        "DatasetMixtureConfig",
        "SFTConfig",
        "DPOConfig",
        "KTOConfig",
        "RewardConfig",
        "GRPOConfig",
        "RLOOConfig",
    ),
    "ms-swift": ("SftArguments", "RLHFArguments", "PretrainArguments"),
}
"""The classes that a recipe of each tool is parsed into."""

FROM_TEXT = ("HubStrategy", "IntervalStrategy", "OptimizerNames", "SaveStrategy", "SchedulerType")
"""Enumerations that ``TrainingArguments`` makes of the text that stands beside them in an annotation, or raises."""


def classes(folder: Path) -> dict[str, list[ast.ClassDef]]:
    """Every class of a source tree by its name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def fields(name: str, known: dict[str, list[ast.ClassDef]], seen: set[str]) -> set[str]:
    """Annotated fields of a class and of its bases, under their aliases too."""
    if name in seen:
        return set()
    seen.add(name)
    found: set[str] = set()
    for node in known.get(name, ()):
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found.add(line.target.id)
                for call in ast.walk(line):
                    if (
                        isinstance(call, ast.keyword)
                        and call.arg == "alias"
                        and isinstance(call.value, ast.Constant)
                    ):
                        found.add(call.value.value)
        for base in node.bases:
            label = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            found |= fields(label, known, seen)
    return {one for one in found if not one.startswith("_")}


def choices(name: str, known: dict[str, list[ast.ClassDef]], seen: set[str]) -> dict[str, set[str]]:
    """The words that each field of a class and of its bases takes, where it takes nothing else."""
    if name in seen:
        return {}
    seen.add(name)
    found: dict[str, set[str]] = {}
    for node in known.get(name, ()):
        for base in node.bases:
            label = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            found = {**choices(label, known, seen), **found}
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                words = listed_choices(line) or allowed(line.annotation, known)
                if words:
                    found[line.target.id] = words
                else:
                    found.pop(line.target.id, None)
    return found


def agreed(
    sources: list[tuple[str, dict[str, list[ast.ClassDef]]]], known: dict[str, list[ast.ClassDef]]
) -> dict[str, set[str]]:
    """The words of each key, of all classes that have it; a key that takes more in one of them is left out."""
    found: dict[str, set[str]] = {}
    free: set[str] = set()
    for name, own in sources:
        words = choices(name, {**known, **own}, set())
        free |= fields(name, own, set()) - words.keys()
        for key, allowed_words in words.items():
            found.setdefault(key, set()).update(allowed_words)
    return {key: allowed_words for key, allowed_words in found.items() if key not in free}


def listed_choices(line: ast.AnnAssign) -> set[str]:
    """``choices`` in the metadata of a field, where all are words."""
    for node in ast.walk(line):
        pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
        for key, value in pairs:
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                words = [one.value for one in value.elts if isinstance(one, ast.Constant)]
                return set(words) if all(isinstance(word, str) for word in words) else set()
    return set()


def allowed(annotation: ast.expr, known: dict[str, list[ast.ClassDef]]) -> set[str] | None:
    """The words of an annotation; None where it takes more than words."""
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            return set()
        return allowed(ast.parse(annotation.value, mode="eval").body, known)
    if isinstance(annotation, ast.BinOp):
        return united([annotation.left, annotation.right], known)
    if isinstance(annotation, ast.Subscript):
        label = getattr(annotation.value, "id", getattr(annotation.value, "attr", ""))
        inner = annotation.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if label == "Literal":
            words = [one.value for one in parts if isinstance(one, ast.Constant) and one.value is not None]
            return set(words) if all(isinstance(word, str) for word in words) else None
        if label == "Annotated":
            return allowed(parts[0], known)
        return united(parts, known) if label in ("Optional", "Union") else None
    return members(getattr(annotation, "id", ""), known)


def united(parts: list[ast.expr], known: dict[str, list[ast.ClassDef]]) -> set[str] | None:
    names = {getattr(part, "id", "") for part in parts}
    becomes_one = any(name in FROM_TEXT and members(name, known) for name in names)
    rest = [part for part in parts if not (becomes_one and getattr(part, "id", "") == "str")]
    found = [allowed(part, known) for part in rest]
    return None if None in found else set().union(*(one for one in found if one))


def members(name: str, known: dict[str, list[ast.ClassDef]]) -> set[str] | None:
    """The values of an enumeration of words, or None."""
    for node in known.get(name, ()):
        bases = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
        if bases & {"Enum", "ExplicitEnum", "StrEnum"}:
            lines = [line.value for line in node.body if isinstance(line, ast.Assign)]
            words = [value.value for value in lines if isinstance(value, ast.Constant)]
            return set(words) if words and all(isinstance(word, str) for word in words) else None
    return None


def launch_flags(folder: Path) -> set[str]:
    """Flags of ``accelerate launch``, which TRL's command line passes on."""
    tree = ast.parse((folder / "commands/launch.py").read_text(encoding="utf-8"))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {
        t[2:].replace("-", "_")
        for t in texts
        if t.startswith("--") and t[2:].replace("-", "").replace("_", "").isalnum()
    }


def plugins(folder: Path) -> dict[str, list[str]]:
    """Keys that Axolotl's plugins bring, by the module that a recipe names."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("integrations/*/args.py")):
        own = classes(file.parent)
        keys = set().union(*(fields(name, own, set()) for name in own))
        found[f"axolotl.integrations.{file.parent.name}"] = sorted(keys)
    return found


def main(arguments: list[str]) -> None:
    folders, versions = zip(*(argument.rsplit("=", 1) for argument in arguments), strict=True)
    axolotl, llamafactory, trl, swift, transformers, old, accelerate = map(Path, folders)
    trainer = {"TrainingArguments", "Seq2SeqTrainingArguments"}
    enumerations = classes(transformers)
    theirs = {name: nodes for name, nodes in enumerations.items() if name in trainer}
    before = {name: nodes for name, nodes in classes(old).items() if name in trainer}
    today = set().union(*(fields(name, theirs, set()) for name in trainer))
    once = set().union(*(fields(name, before, set()) for name in trainer))
    made = {}
    for tool, folder, version in zip(TOOLS, (axolotl, llamafactory, trl, swift), versions, strict=False):
        # Bases named Base...TrainingArguments are those of transformers under another name.
        known = classes(folder)
        keys = set().union(*(fields(name, known, set()) for name in TOOLS[tool]))
        removed = {}
        if tool != "axolotl":
            keys |= today
        if tool in ("llamafactory", "ms-swift"):  # they run with transformers of before the removal too
            keys |= once
        if tool == "trl":
            removed = dict.fromkeys(sorted(once - keys), f"transformers {versions[4]}")
            keys |= launch_flags(accelerate) | {"env"}
        if tool == "ms-swift":
            keys |= {"ENV"}
        own = (
            classes(folder / "trainer") if tool == "trl" else known
        )  # its servers have classes of the same names
        sources = [(name, own) for name in TOOLS[tool]]
        if tool != "axolotl":
            sources += [(name, theirs) for name in sorted(trainer)]
        words = agreed(sources, {**enumerations, **own})
        made[tool] = {
            "version": version,
            "keys": sorted(keys),
            "removed": removed,
            "renamed": RENAMED[tool],
            "choices": {key: sorted(words[key]) for key in sorted(words.keys() & keys)},
        }
    made["axolotl"]["plugins"] = plugins(axolotl)
    OUT.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for tool, one in made.items():
        print(tool, len(one["keys"]), "keys,", len(one["removed"]), "removed")


if __name__ == "__main__":
    if len(sys.argv) != 8:
        sys.exit(__doc__)
    main(sys.argv[1:])
