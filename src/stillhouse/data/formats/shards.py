"""`shards:PATH`: tar files of images with captions, as webdataset and img2dataset write them: KEY.jpg with KEY.txt, or
with KEY.json that has a `caption`.

Files whose names begin with train, val or test are those splits; without such, all are for training. They are read at
any position, so that every order and every start in mid-epoch is possible.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from stillhouse.config.specs import DataSpec
from stillhouse.data.captioned import KEYS, CaptionedImages, CaptionedOptions, captioned
from stillhouse.data.image_text import ImageTextBundle
from stillhouse.data.images import EXTENSIONS, open_image
from stillhouse.data.source import existing
from stillhouse.errors import UserError

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
Place = tuple[Path, int, int]
"""A file inside a tar file: the tar file, where its bytes begin, and how many they are."""


class Options(CaptionedOptions):
    """data.options of `shards:`."""


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> ImageTextBundle:
    """The captioned images of the tar files under PATH, or of one tar file.

    Raises:
        UserError: no tar files, one that cannot be read, images without captions.
    """
    base = existing(rest, root)
    files = [base] if base.is_file() else sorted(base.rglob("*.tar"))
    if not files:
        raise UserError(f"shards: '{base}' holds no .tar files.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        split = next((s for s in ("train", "val", "test") if file.name.startswith(s)), "train")
        by_split.setdefault(split, []).append(file)
    return captioned({s: _read(some) for s, some in by_split.items()}, spec, options, root)


def _read(files: list[Path]) -> CaptionedImages:
    """All samples of tar files, in their order; looks at headers and captions alone."""
    names: list[str] = []
    captions: list[list[str]] = []
    places: list[Place] = []
    for file in files:
        images: dict[str, Place] = {}
        texts: dict[str, list[str]] = {}
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".") if "/" not in member.name else _split(member.name)
                    if not member.isfile():
                        continue
                    if f".{kind.lower()}" in EXTENSIONS:
                        images[key] = (file, member.offset_data, member.size)
                    elif kind in ("txt", "json"):
                        content = tar.extractfile(member)
                        assert content is not None
                        texts.setdefault(key, []).extend(_captions(content.read(), kind, f"{file}:{member.name}"))
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"shards: cannot read '{file}' ({error}).") from None
        bare = next((k for k in images if not texts.get(k)), None)
        if bare is not None:
            raise UserError(f"shards: the image '{bare}' in '{file}' has neither a .txt nor a .json with a caption.")
        for key, place in images.items():
            names.append(f"{file.name}:{key}")
            captions.append(list(dict.fromkeys(texts[key])))
            places.append(place)
    return CaptionedImages(names, captions, _Tars(places, names).item)


def _split(name: str) -> tuple[str, str, str]:
    folder, _, last = name.rpartition("/")
    key, dot, kind = last.partition(".")
    return f"{folder}/{key}", dot, kind


def _captions(content: bytes, kind: str, where: str) -> list[str]:
    try:
        text = content.decode("utf-8").strip()
        if kind == "txt":
            return [text] if text else []
        found = json.loads(text)
    except ValueError:
        raise UserError(f"shards: '{where}' is no text in UTF-8, or no JSON.") from None
    keys = ("caption", "captions", "text")
    value: Any = next((found[k] for k in keys if found.get(k)), []) if isinstance(found, dict) else []
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


class _Tars:
    def __init__(self, places: list[Place], names: list[str]) -> None:
        self._places, self._names = places, names

    def item(self, position: int) -> Image.Image:
        file, start, length = self._places[position]
        with open(file, "rb") as tar:
            tar.seek(start)
            content = tar.read(length)
        return open_image(content, f"'{self._names[position]}'").convert("RGB")
