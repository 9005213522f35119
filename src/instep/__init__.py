"""instep: few-step diffusion models, distilled and aligned in one training loop."""

__version__ = "0.1.0"
