"""Image files: which of them count as data, and how one becomes an RGB image."""

import contextlib
import functools
import importlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow knows these formats, but it cannot decode them by itself.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# A file without a known extension is an image if its first bytes are those of one of these formats.
_SNIFFED = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What systems and tools leave beside people's images.
_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "lost+found"}


def is_junk(name: str) -> bool:
    """Whether the name says that a file or folder is hidden or was left behind by a system."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(path: Path) -> bool:
    """Whether Pillow can open a file, by its extension or else by its first bytes."""
    if path.suffix.lower() in extensions():
        return True
    try:
        with Image.open(path, formats=[f for f in _SNIFFED if f in Image.OPEN]):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


@functools.cache
def extensions() -> frozenset[str]:
    """The extensions of the formats that Pillow and its installed plugins decode."""
    for plugin, register in (
        ("pillow_heif", "register_heif_opener"),
        ("pillow_avif", None),  # it registers itself
    ):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(plugin)
            if register is not None:
                getattr(module, register)()
    known = Image.registered_extensions()
    return frozenset(e for e, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright and convert it to RGB with eight bits in each channel.

    Of an animation the first frame is taken. Pillow alone would clip greys of more than eight bits
    to white. Here 16-bit greys are divided by 257. Other greys are scaled by their largest value:
    floats up to 1 are multiplied by 255, values up to 255 stay as they are, values up to 65,535
    are divided by 257, and larger ones are scaled so that the largest becomes 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = _scale(image.mode, float(pixels.max(initial=0)))
        image = Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale(mode: str, top: float) -> float:
    if mode.startswith("I;16"):
        return 1 / 257
    if mode == "F" and top <= 1:
        return 255.0
    if top <= 255:
        return 1.0
    return 1 / 257 if top <= 65535 else 255 / top
