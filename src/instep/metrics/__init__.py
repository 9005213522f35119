"""Metrics of samples with standard errors, and rows of them that can be compared. It may import `models`, `rewards`, `data`, `methods`, `diffusion`
and `core`.
"""
