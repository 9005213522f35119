"""What a word reader is trained on besides clean words: letters that are erased, smeared, mixed or scribbled over, and videos that are blurred, faint or noisy.

Whatever cannot be read has no letter in its label, so that the reader does not guess at a smear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled import words
from instep.bundled.glyphs import LETTERS
from instep.bundled.words import Drawn

GHOSTS, BLURRED, DAMAGED = 0.06, 0.05, 0.28  # shares of the videos


@dataclass(frozen=True)
class Labelled:
    """Videos and what may be read in them: ink [N, 9, 32, 64] in [0, 1], 1 is ink; letters [N, 4] (symbols 1 to 26, those that count first), how many count
    [N], and where their centres are [N, 9, 4], in pixels from the left, roughly; frames whose letters are all on the canvas [N, 9]; classes of motion, size
    and font [N, 3]; whether size and font can be seen [N]."""

    ink: Tensor
    letters: Tensor
    lengths: Tensor
    centres: Tensor
    whole: Tensor
    classes: Tensor
    clear: Tensor

    def __getitem__(self, rows: Tensor) -> Labelled:
        return Labelled(*(getattr(self, key)[rows] for key in self.__dataclass_fields__))


def joined(*parts: Labelled) -> Labelled:
    """Videos one after the other."""
    return Labelled(*(torch.cat([getattr(part, key) for part in parts]) for key in Labelled.__dataclass_fields__))


def covered(n: int, begin: Tensor, end: Tensor) -> Tensor:
    """The part of each of n pixels in a row that lies between begin and end [...]: [..., n]."""
    i = torch.arange(n)
    return (torch.minimum(i + 1, end[..., None]) - torch.maximum(i, begin[..., None])).clamp(0, 1)


def blurred(ink: Tensor, sigma: Tensor) -> Tensor:
    """Frames [N, F, H, W] blurred by a Gaussian of sigma [N] pixels."""
    reach = torch.arange(-9, 10)
    kernel = (-reach.square() / (2 * sigma[:, None].clamp(min=0.05).square())).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, f, h, w = ink.shape
    rows = F.conv2d(ink.transpose(0, 1).reshape(f, n, h, w), kernel[:, None, :, None], padding=(9, 0), groups=n)
    return F.conv2d(rows, kernel[:, None, None], padding=(0, 9), groups=n).transpose(0, 1)


def labelled(drawn: Drawn, rng: torch.Generator) -> Labelled:
    """Drawn videos with their labels, a part of them damaged, and all disturbed."""
    ink, shown = 1 - drawn.media.mean(1), drawn.shown
    letters = torch.tensor([[1 + LETTERS.index(letter) for letter in spec.word] for spec in shown])
    classes = torch.tensor([[words.motion_of(spec), words.SIZES.index(spec.size or ""), words.FONTS.index(spec.font or "")] for spec in shown])
    n = len(shown)
    u = torch.rand(n, generator=rng)
    ghost, smooth = u < GHOSTS, (u >= GHOSTS) & (u < GHOSTS + BLURRED)
    hurt = (u > 1 - DAMAGED)[:, None] & (torch.rand(n, 4, generator=rng) < 0.4)
    ink = _damaged(ink, drawn, hurt, rng)
    mixed = torch.rand(n, 1, 1, 1, generator=rng) * 0.3 + 0.35
    ink = torch.where(ghost[:, None, None, None], torch.lerp(ink, ink.roll(1, 0), mixed), ink)
    ink = torch.where(smooth[:, None, None, None], blurred(ink, 3 + 2 * torch.rand(n, generator=rng)), ink)
    kept = ~hurt & ~(ghost | smooth)[:, None]
    order = (~kept).int().argsort(dim=1, stable=True)
    centres = drawn.letters.mean(3).gather(2, order[:, None].expand(-1, words.FRAMES, -1))
    return Labelled(_disturbed(ink, rng), letters.gather(1, order), kept.sum(1), centres, drawn.whole, classes, ~(ghost | smooth))


def _damaged(ink: Tensor, drawn: Drawn, hurt: Tensor, rng: torch.Generator) -> Tensor:
    """Videos whose letters `hurt` [N, 4] are replaced: by nothing, in their upper or lower part, by a smear, another video's ink, or a scribble."""
    n = len(ink)
    _, top, _, bottom = drawn.boxes.unbind(-1)
    smear = blurred(ink, torch.full((n,), 2.5)) * 1.2
    scribble = F.interpolate(torch.rand(n, 1, 16, 32, generator=rng), scale_factor=2.0, mode="bilinear").mul(4).sub(1.5).clamp(0, 1)
    others = torch.stack([torch.zeros_like(ink), smear, (ink + ink.roll(1, 0)) / 2, scribble.expand_as(ink)])
    for k in range(4):
        kind = torch.randint(6, (n,), generator=rng)  # 0 to 3: all of it by one of the others; 4, 5: one half by nothing
        cut = top + (bottom - top) * (0.4 + 0.2 * torch.rand(n, 1, generator=rng))
        high, low = torch.where((kind == 4)[:, None], cut, top), torch.where((kind == 5)[:, None], cut, bottom)
        wide = drawn.letters[:, :, k]
        mask = covered(words.HEIGHT, high - 0.5, low + 0.5)[..., None] * covered(words.WIDTH, wide[..., 0] - 0.3, wide[..., 1] + 0.3)[..., None, :]
        other = others[torch.where(kind < 4, kind, 0), torch.arange(n)]
        ink = torch.where(hurt[:, k, None, None, None], torch.lerp(ink, other, mask), ink)
    return ink


def _disturbed(ink: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the videos stretched up to 6 % and sheared, half blurred up to a pixel; faint ink, a grey ground, white noise of up to 0.1."""
    n = len(ink)
    u = torch.rand(8, n, generator=rng) * 2 - 1
    theta = torch.zeros(n, 2, 3)
    some = (u[0] > 0).float()
    theta[:, 0, 0], theta[:, 1, 1] = (u[1] * 0.06 * some).exp(), (u[2] * 0.06 * some).exp()
    theta[:, 0, 1] = u[3] * 0.05 * some
    ink = F.grid_sample(ink, F.affine_grid(theta, list(ink.shape), align_corners=False), align_corners=False)
    soft = (u[4] > 0)[:, None, None, None]
    ink = torch.where(soft, blurred(ink, u[5].abs()), ink)
    strength, ground = (1 - 0.4 * u[6].square())[:, None, None, None], (0.12 * u[7].clamp(min=0))[:, None, None, None]
    noise = torch.randn(ink.shape, generator=rng) * torch.rand(n, 1, 1, 1, generator=rng).square() * 0.1
    return torch.lerp(ink * strength, torch.ones(()), ground * (1 - ink)) + noise
