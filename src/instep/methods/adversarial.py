"""The adversarial force: the gradient of the discriminator (DMD2 Section 4.3; AMD Eq. 27)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.diffusion.levels import LevelSampler, Uniform
from instep.methods.term import Force, Need, View


@dataclass(frozen=True, kw_only=True)
class Adversarial(Force):
    """Gradient with respect to x of mean softplus(-l(x_t)), which is -log D of the noised sample, D = sigmoid(l).

    l is the logit of the fake's own head at a fresh level; it is conditioned on the exit like every call of the fake. The batch-mean loss has its own
    scale, so `weight` is DMD2's (5e-3 to 1e-2 there) and not comparable with the matching force's.
    """

    name: str = "gan"
    role: str = "fake"
    levels: LevelSampler = field(default_factory=Uniform)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"real"})

    def __call__(self, view: View) -> Tensor:
        samples = view.samples
        point = samples.point(self.on).detach()
        t = view.levels(self.levels, len(point.x), point.level).to(point.x.dtype)
        noise = view.randn_like(point.x)
        with torch.enable_grad():
            x = point.x.detach().requires_grad_()
            logit = view.roles[self.role](view.path.renoise(x, noise, t), t, samples.cond.at_exit(point.exit_id)).logit
            assert logit is not None, f"role {self.role!r} has no discriminator head"
            return torch.autograd.grad(F.softplus(-logit).mean(), x)[0]
