"""Casts to FP8 in plain torch."""

KERNELS: dict = {}
