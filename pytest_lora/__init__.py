"""Tests for LoRA and QLoRA set-ups: inspected into plain facts, judged by rules, reported by pytest."""
