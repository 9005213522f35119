"""Prompts, media files as tensors, preference pairs and sets of samples. It may import `diffusion` and `core`."""
