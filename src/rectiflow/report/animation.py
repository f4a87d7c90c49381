"""Pictures one after the other: GIF by Pillow, MP4 by ffmpeg where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from PIL import Image

from rectiflow.errors import InputError, install
from rectiflow.files import replacing
from rectiflow.report.pictures import SMALL

LEAST = 256
"""Side, in pixels, that small pictures are enlarged to."""
SAMPLE = 128
"""Side of the copies from which the palette of large pictures is taken."""


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with each pixel made a square, so that it can be seen; others unchanged.

    Example:
        >>> enlarged(Image.new("RGB", (64, 64))).size, enlarged(Image.new("RGB", (512, 512))).size
        ((256, 256), (512, 512))
    """
    if max(image.size) > SMALL:
        return image
    scale = max(1, LEAST // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_gif(frames: Sequence[Image.Image], path: str | PathLike[str], *, fps: float = 10) -> Path:
    """Save pictures as a GIF that begins again at its end, and return its path.

    All frames share one palette of 256 colours, so that what stands still does not flicker.

    Args:
        frames: RGB, of one size.
        path: The file, replaced only once the new one is complete.
        fps: Frames a second; GIF rounds their length to hundredths of a second.

    Raises:
        InputError: Longer or shorter frames than a GIF can have.
    """
    check_fps(fps)
    path = Path(path)
    palette = _palette(frames)
    # Without dithering, whose dots would move from frame to frame.
    reduced = [
        enlarged(frame.convert("RGB")).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    with replacing(path) as unfinished:
        reduced[0].save(
            unfinished,
            format="GIF",
            save_all=True,
            append_images=reduced[1:],
            duration=_milliseconds(fps),
            loop=0,
            optimize=False,
        )
    return path


def save_mp4(frames: Sequence[Image.Image], path: str | PathLike[str], *, fps: float = 10) -> Path:
    """Save pictures as an H.264 film that players and browsers show, and return its path.

    Args:
        frames: RGB, of one size with even sides.
        path: The file, replaced only once the new one is complete.
        fps: Frames a second.

    Raises:
        InputError: imageio-ffmpeg is not installed.
    """
    check_video()
    check_fps(fps)
    from imageio_ffmpeg import write_frames

    path = Path(path)
    pictures = [enlarged(frame.convert("RGB")) for frame in frames]
    with replacing(path) as unfinished:
        writer = write_frames(
            str(unfinished),
            pictures[0].size,
            fps=fps,
            quality=8,
            macro_block_size=2,
            output_params=["-f", "mp4"],  # the hidden name has another ending
            ffmpeg_log_level="error",
        )
        try:
            writer.send(None)
            for picture in pictures:
                writer.send(picture.tobytes())
        finally:
            writer.close()
    return path


def check_video() -> None:
    """See that films can be written.

    Raises:
        InputError: imageio-ffmpeg is not installed.
    """
    if find_spec("imageio_ffmpeg") is None:
        raise InputError(f"an .mp4 needs imageio-ffmpeg: {install('video')}, or give a .gif")


def check_fps(fps: float) -> None:
    """Refuse a number of frames a second that a GIF cannot have.

    Raises:
        InputError: It is not from 1 to 50.
    """
    if not 1 <= fps <= 50:
        raise InputError(f"fps is {fps}: give 1 to 50 frames a second")


def _milliseconds(fps: float) -> int:
    return 10 * round(100 / fps)


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """256 colours that all frames have in common."""
    width, height = frames[0].size
    scale = min(1.0, SAMPLE / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    strip = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame.convert("RGB").resize((width, height)), (0, number * height))
    return strip.quantize(256, method=Image.Quantize.MEDIANCUT)
