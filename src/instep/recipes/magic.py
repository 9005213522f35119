"""MagicDistillation (Shao et al. 2025): a teacher that is adapted toward the student; AMD Table 1, fourth column."""

from __future__ import annotations

from instep.methods.adapted_teacher import Annealed
from instep.methods.critics import FakeScoreLoss
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig, LoRA, RoleConfig
from instep.recipes.common import Common


def magic(
    common: Common = Common(),
    *,
    distil: int = 0,
    iterations: int = 100,
    teacher_rank: int = 8,
    teacher_updates: int = 1,
    adapter: AdamWConfig = AdamWConfig(4e-4),
    anneal: Annealed = Annealed(),
) -> Recipe:
    """Distil only: an adapter moves the teacher toward the student's samples and is annealed away (MagicDistillation).

    Args:
        common: options of every recipe.
        distil: student updates of plain matching before; 0 leaves the stage out.
        iterations: student updates.
        teacher_rank: rank of the teacher's adapter.
        teacher_updates: updates of that adapter for each of the student.
        adapter: AdamW of that adapter.
        anneal: its scale in the matching force over the stage.
    """
    adapt_teacher = FakeScoreLoss(role="teacher", updates=teacher_updates, reuse=common.reuse, levels=common.renoise, adapter_scale=1.0)
    stage = common.stage("adapt-teacher", iterations, (common.matching(adapter=anneal),), (common.critic(), adapt_teacher))
    return common.recipe("magic", common.distil(distil), stage, teacher=RoleConfig(adapter, LoRA(teacher_rank, float(teacher_rank)), scale=0.0))
