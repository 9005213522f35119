"""The parts of a recipe: forces, objectives and critics, and the frozen configuration of stages and recipes. It may import `data`, `diffusion`
and `core`."""
