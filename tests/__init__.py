"""Tests; `python -m tests.run` runs all of them, under every DSPy version."""
