"""Videos as .mp4 files (H.264), where a codec is installed."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from instep.core.files import write_bytes
from instep.data.animation import check

QUALITY = "10"  # constant rate factor, which VBench asks for: 0 is lossless, 51 the worst


def check_codec() -> Any:
    """Returns PyAV. Raises ValueError, with what to install, where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ValueError("out: .mp4 files need a codec; install it (pip install 'imageio[pyav]')") from error
    return av


def save_video(path: Path, frames: Tensor, fps: float) -> None:
    """Frames uint8 [F, H, W, 3], of even height and width, as an .mp4, atomically; its colours are stored at half the resolution, as players expect.

    Raises ValueError for other frames, and where no codec is installed.
    """
    check(frames[None])
    av = check_codec()
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"size: {height} x {width} is not allowed in an .mp4, whose height and width are even; sample at another --size")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": QUALITY})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    write_bytes(path, buffer.getvalue())
