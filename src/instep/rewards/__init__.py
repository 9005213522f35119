"""Rewards, one file for each kind, and rewards of latents through the decoder. It may import `data`, `methods`, `diffusion` and `core`."""
