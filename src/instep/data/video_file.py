"""Video files through PyAV, where it is installed: read a frame at a time, and written as .mp4 (H.264)."""

from __future__ import annotations

import io
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from instep.core.files import write_bytes
from instep.data.animation import check

if TYPE_CHECKING:
    import numpy as np

QUALITY = "10"  # constant rate factor, which VBench asks for: 0 is lossless, 51 the worst
# what is in .mp4 and .mov, .webm and .mkv, .avi; others (playlists) name files and addresses that FFmpeg would open
CONTAINERS = "mov,matroska,avi"
UNKNOWN_RATE = 25.0  # of a file that has neither timestamps nor a rate; FFmpeg takes the same


class Frame(NamedTuple):
    """A frame of a video: uint8 [H, W, 3], the second at which it begins, from the first frame on, and how many seconds it stands if no other follows."""

    pixels: np.ndarray
    start: float
    seconds: float


def check_codec(where: str = "out: an .mp4 file", otherwise: str = "") -> Any:
    """Returns PyAV. Raises ValueError, which begins with `where` and ends with what to do `otherwise`, where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{where} needs a codec; install it (pip install 'instep[video]'){otherwise}") from error
    return av


def video_frames(source: Path | bytes, where: str, most: int) -> Generator[Frame, None, None]:
    """The frames of a video file, or of what it holds, in the order they are shown; each is decoded when it is asked for. The file is closed with the iterator.

    Colours are those of FFmpeg's own conversion to RGB by the matrix and range that the stream states (BT.601, limited range, where it states none);
    transfer functions stay as they are, so that HDR is not mapped to SDR. Frames are turned and mirrored as the header's display matrix says, to the nearest
    quarter turn. Pixels count as square. Timestamps say when a frame begins; where there are none, the average rate does.

    Raises ValueError, which begins with `where`: if PyAV is missing, for a file that is damaged, in another container than .mp4, .mov, .webm, .mkv and .avi
    are, or without a video stream, and for frames of more than `most` pixels, before one is decoded if the header tells the size.
    """
    av = check_codec(where, ", or save it as an animated .webp, which needs none")
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(opened, options={"format_whitelist": CONTAINERS}, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{where} has no video stream; take it out")
            if stream.codec_context is None:
                raise ValueError(f"{where} is in a format that PyAV has no codec for; convert it (H.264 will do), or take it out")
            check_pixels(where, stream.codec_context.width, stream.codec_context.height, most)
            step = 1 / float(stream.average_rate or stream.guessed_rate or UNKNOWN_RATE)
            first, start = None, -step
            for frame in container.decode(stream):
                check_pixels(where, frame.width, frame.height, most)
                if frame.is_corrupt:
                    raise ValueError(f"{where} is cut off or damaged {max(start + step, 0):.2f} s after its beginning; make it again, or take it out")
                if frame.time is None:
                    start += step
                else:
                    first = frame.time if first is None else first
                    start = max(start, frame.time - first)
                yield Frame(_upright(frame), start, float(frame.duration * frame.time_base) if frame.duration else step)
    except av.FFmpegError as error:
        raise ValueError(f"{where} cannot be read as a video ({error.strerror or error}); make it again, or take it out") from error


def _upright(frame: Any) -> np.ndarray:
    """RGB, uint8 [H, W, 3], as the display matrix of a decoded frame says: (x, y) is shown at (a x + c y, b x + d y)."""
    import numpy as np

    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def check_pixels(where: str, width: int, height: int, most: int) -> None:
    """ValueError, which begins with `where`, for a frame of more than `most` pixels."""
    if width * height > most:
        raise ValueError(f"{where} is {height} x {width}, more than {most:,} pixels; reduce it")


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
