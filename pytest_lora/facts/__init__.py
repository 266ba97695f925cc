"""What was seen, as frozen dataclasses of plain strings and numbers; no torch here."""
