"""`stillhouse predict`: what a product finds in a user's images or texts, as lines, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.images import image_files, open_image
from stillhouse.data.point_scenes import read_sweep
from stillhouse.errors import UserError
from stillhouse.runs.products import Student, load_product


def predict(
    folder: str | Path,
    inputs: Sequence[str],
    out: str | Path | None = None,
    trust_code: bool = False,
    names: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Iterator[str]:
    """A line for each input, as it is found; with `out`, `predictions.jsonl` and a PNG for each picture go there.

    Args:
        folder: a run's folder, or a product folder.
        inputs: image files or folders of them; texts, for a product that reads texts; or files of point clouds
            (float32 x, y, z, intensity).
        names: of a product that embeds texts, the classes to choose among; default: those it was trained with.
        texts: likewise, whole texts to choose among.

    Raises:
        UserError: a product that predicts nothing for people, or an input that is not there or no image.
    """
    product = load_product(folder, trust_code)
    if not product.reads:
        raise UserError(
            f"{folder} holds a product of kind '{product.kind}', which predicts nothing for people; load it and call "
            "its module."
        )
    if names and texts:
        raise UserError("Give class names or whole texts to choose among, not both.")
    if names or texts:
        if not isinstance(product, Student):
            raise UserError(f"{folder} holds a product of kind '{product.kind}', which chooses among no classes.")
        product.task = product.task.among(names or texts, whole=bool(texts))
    place = None if out is None else Path(out).expanduser()
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "predictions.jsonl").write_text("")
    if isinstance(product, Student):
        product.module.eval()
    if product.reads == "files":
        for name, found in product.found_in(_files(inputs)):
            yield shown(name, found, place)
    elif product.reads == "images":
        for path in _files(inputs):
            yield shown(path.name, product.predict([decoded(path)])[0], place)
    elif product.reads == "points":
        for given in inputs:
            yield shown(Path(given).name, product.predict([sweep(Path(given).expanduser())])[0], place)
    else:
        for number, text in enumerate(inputs):
            yield shown(text if len(text) < 60 else f"text {number}", product.predict([text])[0], place)


def _files(inputs: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = [Path(p) for p in image_files(path)]
            if not inside:
                raise UserError(f"The folder '{path}' holds no images.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"There is no image or folder '{path}'.")
    return found


def sweep(path: Path) -> Tensor:
    """A file's point cloud (M, 4). Raises `UserError` where there is none."""
    if not path.is_file():
        raise UserError(f"There is no file '{path}' of points.")
    return torch.from_numpy(read_sweep(path))


def decoded(path: Path) -> Tensor:
    """A file's image, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(open_image(path).convert("RGB"))).permute(2, 0, 1)


def shown(name: str, found: dict[str, Any], place: Path | None = None) -> str:
    """The line of one input; with a place, its JSON and its picture are written there."""
    plain = {k: v for k, v in found.items() if not isinstance(v, Tensor)}
    if place is not None:
        picture = found.get("picture")
        if picture is not None:
            from torchvision.io import write_png

            write_png(picture, str(place / f"{Path(name).stem}.png"))
            plain["picture"] = f"{Path(name).stem}.png"
        with open(place / "predictions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"input": name, **plain}, ensure_ascii=False) + "\n")
    return f"{name}: {'; '.join(_words(v) for v in plain.values() if not isinstance(v, list))}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    return str(value)
