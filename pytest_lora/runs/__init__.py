"""Beside a running training: the callback of transformers, a loop of one's own, several ranks."""
