"""Texts to indexed token files, and indexed token files to the micro-batches of a step."""
