"""Sets of samples with their prompts: real ones, labelled pairs, and stored outputs of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from instep.data.prompt import Prompt, as_prompts


@dataclass(frozen=True)
class TeacherSamples:
    """Outputs of the teacher's many-step sampler: noise and latents [N, C, (F,) H, W], float32, on the CPU; one prompt a row."""

    prompts: tuple[Prompt, ...]
    noise: Tensor
    latents: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", as_prompts(self.prompts))


@dataclass(frozen=True)
class RealSamples:
    """Real samples, each with its prompt: latents [N, C, (F,) H, W]. A discriminator uses them as real samples, and DM-Align (Pair) as preferred ones."""

    prompts: tuple[Prompt, ...]
    latents: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", as_prompts(self.prompts))
        if len(self.prompts) != len(self.latents) or not self.prompts:
            raise ValueError(f"real: {len(self.prompts)} prompts for {len(self.latents)} samples; give one prompt a sample, at least one")


@dataclass(frozen=True)
class PairSamples:
    """Labelled preferences: of each prompt a chosen and a rejected sample, latents [N, C, (F,) H, W]."""

    prompts: tuple[Prompt, ...]
    chosen: Tensor
    rejected: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", as_prompts(self.prompts))
        if not self.prompts or len(self.prompts) != len(self.chosen) or self.chosen.shape != self.rejected.shape:
            raise ValueError(
                f"pairs: {len(self.prompts)} prompts, chosen samples {tuple(self.chosen.shape)} and rejected ones {tuple(self.rejected.shape)}; give one of "
                "each a prompt, of one shape, at least one pair"
            )

    @property
    def preferred(self) -> RealSamples:
        """The chosen ones alone."""
        return RealSamples(self.prompts, self.chosen)
