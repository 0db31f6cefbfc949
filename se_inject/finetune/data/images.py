"""Image files: which of them count as data, and how one becomes an RGB image."""

import contextlib
import functools
import importlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow knows these formats and cannot decode them by itself.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# A file of another extension, or of none, is an image if its first bytes are those of one of these.
_SNIFFED = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What systems and tools leave beside people's images.
_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "lost+found"}


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind, and so is no data."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(path: Path) -> bool:
    """Whether Pillow opens such a file: by its extension, else by its first bytes."""
    if path.suffix.lower() in extensions():
        return True
    try:
        with Image.open(path, formats=[f for f in _SNIFFED if f in Image.OPEN]):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


@functools.cache
def extensions() -> frozenset[str]:
    """The extensions of what Pillow decodes, with those of the plugins that are installed."""
    for plugin, register in (
        ("pillow_heif", "register_heif_opener"),
        ("pillow_avif", None),  # registers itself
    ):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(plugin)
            if register is not None:
                getattr(module, register)()
    known = Image.registered_extensions()
    return frozenset(e for e, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright, with eight bits a channel, RGB; of an animation the first frame.

    Pillow alone would clip deeper greys to white. 16 bits are divided by 257; other numbers keep
    their order: by 257 too where they fit into 16 bits and not into 8, and from 0 to 1 are shares.
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
