"""Labelled images as files that other programs read: an ImageFolder, a Parquet file, a contact sheet."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.files import atomic_write


def to_folder(images: Tensor, labels: list[int], classes: list[str], folder: str | Path) -> int:
    """Write `folder/train/CLASS/NUMBER.png`, as an ImageFolder (classes keep their order by a number before the name);
    returns how many images.

    Args:
        images: (N, C, H, W) uint8.
        labels: class ids.

    Raises:
        UserError: a folder `train` that is there already.
    """
    base = Path(folder) / "train"
    if base.exists():
        raise UserError(
            f"There is a folder '{base}' already, and old images would be mixed with new ones; take another folder, "
            "or remove that one."
        )
    temporary = base.with_name("train.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    names = folder_names(classes)
    counts = [0] * len(names)
    for image, label in zip(images, labels):
        (temporary / names[label]).mkdir(parents=True, exist_ok=True)
        (temporary / names[label] / f"{counts[label]:05d}.png").write_bytes(png(image))
        counts[label] += 1
    os.replace(temporary, base)
    return len(images)


def to_parquet(images: Tensor, labels: list[int], classes: list[str], logits: Tensor | None, path: str | Path) -> int:
    """Write one Parquet file in the Hugging Face image layout (`img` as PNG, `label`, and `logits` where images have
    soft labels); returns how many images.

    Args:
        images: (N, C, H, W) uint8.
        labels: class ids.
        logits: (N, classes), or None.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = pa.array(
        [{"bytes": png(x), "path": None} for x in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    columns: dict[str, Any] = {"img": encoded, "label": pa.array(labels, pa.int64())}
    features: dict[str, Any] = {"img": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    if logits is not None:
        columns["logits"] = pa.array(logits.float().tolist(), pa.list_(pa.float32()))
        features["logits"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with atomic_write(Path(path)) as temporary:
        pq.write_table(table, temporary)
    return len(images)


def folder_names(classes: list[str]) -> list[str]:
    """Names of class folders that sort in the order of the classes."""
    digits = len(str(len(classes) - 1))
    return [f"{i:0{digits}d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}" for i, name in enumerate(classes)]


def contact_sheet(pixels: Tensor, labels: Tensor, columns: int = 10, rows: int = 100) -> Tensor:
    """Images (N, C, H, W) with pixels in [0, 1] as one uint8 image (C, h, w): a row a class, its first `columns`
    images; where classes have one image each, ten classes a row. Small images are enlarged, large ones made small."""
    from torchvision.utils import make_grid

    shown = [pixels[labels == c][:columns] for c in labels.unique().tolist()[:rows]]
    wide = max(len(s) for s in shown)
    grey = 0.5
    padded = torch.cat([torch.cat([s, s.new_full((wide - len(s), *s.shape[1:]), grey)]) for s in shown]).clamp(0, 1)
    side, few = padded.shape[-1], len(padded) <= 100
    least, most = (64, 96) if few else (32, 48)
    if side > most:
        padded = F.interpolate(padded, scale_factor=most / side, mode="area")
    else:
        times = max(1, least // side)
        padded = padded.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return (make_grid(padded, nrow=wide if wide > 1 else 10, padding=2, pad_value=grey) * 255).round().to(torch.uint8)


def png(image: Tensor) -> bytes:
    """A uint8 image (C, H, W), grey or RGB, as the bytes of a PNG file."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(out, "png")
    return out.getvalue()
