"""Rules whose fix no program can apply to a script, and why."""

BY_HAND: dict[str, str] = {
    "LORA130": "the base in 16 bit has to be loaded from its files",
}
