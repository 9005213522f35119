"""What a recipe is made of: forces, objectives and critics, and the frozen configuration of stages and recipes. It may import `diffusion` and `core`."""
