"""Image files as every source reads them: `open_image` gives 8 bits a channel, grey ("L") or colour ("RGB"), upright,
on white where it is transparent.

Files are opened by an explicit list of formats, all decoded inside the process: a `.png` that holds PostScript starts
no other program.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from stillhouse.errors import UserError

T = TypeVar("T")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
WHOLE = 65535
ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[i] for i in (5, 6, 7, 8)]


def open_image(source: str | os.PathLike[str] | bytes, where: str | None = None) -> Image.Image:
    """The first frame of an image file, in mode "L" or "RGB".

    Args:
        source: a path, or the encoded bytes.
        where: what a message calls it; default: the path.

    Raises:
        UserError: a file that is truncated, of another format, too large, or no regular file; the message names it.
    """
    where = where or f"'{source!s}'"
    return _guarded(where, lambda: _opened(source, where, _standard))


def is_grey(source: str | os.PathLike[str] | bytes, where: str) -> bool:
    """Whether `open_image` gives mode "L", from the file's header alone. Raises as `open_image`."""
    return _guarded(where, lambda: _opened(source, where, lambda image: image.mode in GREY))


def is_transparent(path: str | os.PathLike[str]) -> bool:
    """Whether an image has an alpha channel or a transparent colour, from the file's header alone. Raises as
    `open_image`."""
    return _guarded(f"'{path!s}'", lambda: _opened(path, f"'{path!s}'", lambda image: image.has_transparency_data))


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of the image that `open_image` gives, from the file's header alone. Raises as `open_image`."""

    def size(image: Image.Image) -> tuple[int, int]:
        turned = _turn(image) in SIDEWAYS and image.format != "TIFF"  # of a TIFF, Pillow gives the size after the turn
        return (image.width, image.height) if turned else (image.height, image.width)

    return _guarded(f"'{path!s}'", lambda: _opened(path, f"'{path!s}'", size))


def open_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """(H, W) int64 ids of a mask: the grey values of a file, or the indices of its palette.

    Raises:
        UserError: a file in colour, or as `open_image`.
    """
    where = f"'{path!s}'"

    def ids(image: Image.Image) -> np.ndarray:
        if image.mode != "P" and (image.mode not in GREY or image.mode in ("LA", "La", "F")):
            raise UserError(
                f"The mask {where} is in colour (mode {image.mode}); a mask holds one class id a pixel, grey or as a "
                "palette's index."
            )
        return np.asarray(_upright(image)).astype(np.int64)

    return _guarded(where, lambda: _opened(path, where, ids))


def standard(image: Image.Image, where: str) -> Image.Image:
    """Any image of PIL in mode "L" or "RGB": turned as its EXIF block says, and blended over white where it is
    transparent.

    Of more than 8 bits, integers are scaled by the range of 16 bits, floats in [0, 1] or [0, 255] by that; other values
    by the image's own range.

    Raises:
        UserError: an image that cannot be decoded or converted; the message calls it `where`.
    """
    return _guarded(where, lambda: _standard(image))


def from_array(values: np.ndarray, where: str) -> Image.Image:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of 8 or 16 bits as an image. Raises `UserError` for another
    shape or type."""
    if values.dtype == np.uint16:
        values = np.rint(values * (255 / WHOLE)).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return _guarded(where, lambda: Image.fromarray(values))


def _opened(source: str | os.PathLike[str] | bytes, where: str, use: Callable[[Image.Image], T]) -> T:
    if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
        raise UserError(
            f"Cannot read the image {where}: it is no regular file (a pipe, a device or a folder); remove it."
        )
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            size = f"{image.width} x {image.height} pixels, more than {most / 1e6:.0f} million"
            raise UserError(f"Cannot read the image {where}: it has {size}; make it smaller.")
        return use(image)


def _guarded(where: str, make: Callable[[], T]) -> T:
    """What `make` gives; whatever goes wrong becomes a sentence that names the image."""
    try:
        return make()
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"Cannot read the image {where} (it is none of {', '.join(FORMATS)}); replace or remove it."
        ) from None
    except Exception as error:  # what a damaged or hostile file makes a decoder raise has no common class
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"Cannot read the image {where} ({reason}); replace or remove it.") from None


def _standard(image: Image.Image) -> Image.Image:
    image = _upright(image)
    mode = "L" if image.mode in GREY else "RGB"
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def as_channels(image: Image.Image, channels: int, where: str) -> Image.Image:
    """A standard image with 1 or 3 channels. Raises `UserError` for colour where grey is expected, which would be
    lost."""
    image = standard(image, where)
    if channels == 1 and image.mode != "L":
        raise UserError(
            f"{where} is in colour, but the images looked at first are grey; make all of them grey, or all of them "
            "colour."
        )
    return image if channels == 1 else image.convert("RGB")


def channels(grey: Iterable[bool]) -> int:
    """3 if any image of a set is in colour, else 1; looks no further than the first that is."""
    return 1 if all(grey) else 3


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {k: v for k, v in image.info.items() if k == "transparency"}  # no EXIF block: it is turned once
    return turned


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block has no say; the pixels are there
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        within = next((top for top in (1.0, 255.0) if low >= 0 and high <= top), None)
    else:
        within = WHOLE if low >= 0 and high <= WHOLE else None
    low, span = (0.0, within) if within is not None else (low, (high - low) or 1.0)
    return Image.fromarray(np.rint((values - low) * (255 / span)).astype(np.uint8))


def is_system(name: str) -> bool:
    """Whether a file or folder belongs to an operating system or archiver, not to the data: `._x.png`, `__MACOSX`,
    `Thumbs.db`, `.DS_Store`."""
    return name.startswith(".") or name.lower() in SYSTEM


def image_files(folder: str | Path) -> list[str]:
    """Paths of all image files below a folder, sorted; those of the system are left out, links to folders not followed.

    Raises:
        UserError: an image's name on something that is no regular file.
    """
    found: list[str] = []
    for entry in os.scandir(folder):
        if is_system(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            found += image_files(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
            if not entry.is_file():
                raise UserError(f"'{entry.path}' is no regular file (a pipe, a device or a broken link); remove it.")
            found.append(entry.path)
    return sorted(found)
