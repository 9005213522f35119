"""One file a reward, or kind of reward, and rewards of latents through the decoder. It may import `data`, `methods`, `diffusion` and `core`."""
