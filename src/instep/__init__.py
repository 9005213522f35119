"""instep: few-step diffusion models, distilled and aligned in one training loop.

Everything below is imported when it is first used, so `import instep` costs next to nothing. The function that trains is
`instep.training.run.train`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from instep.core.version import __version__

if TYPE_CHECKING:
    from instep.core.size import VideoSize
    from instep.data.samples import RealSamples
    from instep.models import load
    from instep.models.dit import DiTFamily
    from instep.models.wan import WanFamily
    from instep.recipes.amd import amd
    from instep.recipes.common import Common
    from instep.recipes.decoupled_dmd import decoupled_dmd
    from instep.recipes.dm_align import dm_align_group, dm_align_pair
    from instep.recipes.dmd import dmd, dmd2
    from instep.recipes.magic import magic
    from instep.training.options import RunOptions
    from instep.training.run import Run

_WHERE = {
    "VideoSize": "instep.core.size",
    "load": "instep.models",
    "WanFamily": "instep.models.wan",
    "DiTFamily": "instep.models.dit",
    "dm_align_group": "instep.recipes.dm_align",
    "dm_align_pair": "instep.recipes.dm_align",
    "dmd": "instep.recipes.dmd",
    "dmd2": "instep.recipes.dmd",
    "decoupled_dmd": "instep.recipes.decoupled_dmd",
    "magic": "instep.recipes.magic",
    "amd": "instep.recipes.amd",
    "Common": "instep.recipes.common",
    "Run": "instep.training.run",
    "RunOptions": "instep.training.options",
    "RealSamples": "instep.data.samples",
}
__all__ = [
    "Common",
    "DiTFamily",
    "RealSamples",
    "Run",
    "RunOptions",
    "VideoSize",
    "WanFamily",
    "__version__",
    "amd",
    "decoupled_dmd",
    "dm_align_group",
    "dm_align_pair",
    "dmd",
    "dmd2",
    "load",
    "magic",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'instep' has no attribute {name!r}")
