"""Compiled kernels: a subpackage per instruction-set tier, all of the same sources."""
