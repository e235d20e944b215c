"""Longer context windows for open language models, without making them worse on short texts."""

__version__ = "0.1.0"
