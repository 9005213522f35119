"""Reads the first frames of image-to-video prompts from the files that the prompts name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from instep.core.size import Size
from instep.data.media import fitted, read_media
from instep.data.prompt import Prompt, as_prompts


def read_first_frame(prompt: Prompt, size: Size) -> Tensor:
    """A prompt's first frame [3, H, W] in [0, 1] at `size`: its image file, or the first frame of an animation or video.

    ValueError for a prompt without an image, and for a file that is missing, cannot be read or has another shape.
    """
    if prompt.image is None:
        raise ValueError(
            f"prompt: {prompt.text!r} names no first frame, and this model begins its videos with one; write {str(Prompt(prompt.text, 'FILE'))!r} in a text "
            f'file or on the command line, {{"prompt": ..., "image": FILE}} in a file of JSON lines, or give Prompt({prompt.text!r}, image=FILE)'
        )
    name = str(prompt.image)
    if not Path(name).is_file():
        raise ValueError(f"image: {name} of prompt {prompt.text!r} is not a file that exists; give an image or a video")
    return fitted(read_media(Path(name))[:, :1], Size(size.height, size.width, 1), name)[:, 0]


def digest(prompts: Sequence[Prompt]) -> str | None:
    """A digest of the contents of the prompts' image files, in order; None if no prompt names a file."""
    names = dict.fromkeys(prompt.image for prompt in as_prompts(prompts))
    files = [name for name in names if name is not None and Path(name).is_file()]
    return hashlib.sha256(b"".join(hashlib.sha256(Path(name).read_bytes()).digest() for name in files)).hexdigest()[:16] if files else None
