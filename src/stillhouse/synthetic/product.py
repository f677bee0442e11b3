"""`SyntheticSet`: a small set of images with hard or soft labels, and the recipe that made it. A product of kind
`synthetic_set`.

Its folder holds `images.safetensors` (images, labels, soft labels, whitening), `product.json` and `sheet.png` to look
at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.functional.whitening import Whitening
from stillhouse.runs.products import Product, read_meta
from stillhouse.synthetic.files import contact_sheet, png, to_folder, to_parquet
from stillhouse.synthetic.initial import decode
from stillhouse.synthetic.real import unnormalised
from stillhouse.synthetic.relabel import ViewLabels, Views

FAR = 100.0  # of a normalised image: pixels that were learned without bounds stay far below; 0 … 255 does not


@dataclass
class SyntheticSet(Product):
    """A few images that stand for a data set.

    Attributes:
        images: (N, C, H, W) float32 as networks see them: normalised by `mean` and `std`, or whitened.
        labels: (N,) int64.
        classes: class names; every class has an image.
        mean, std: of the normalisation.
        bounded: whether the images are pictures, with pixels in [0, 1]; False: learned without bounds.
        whitening: in place of the normalisation.
        soft: (N * factor^2, classes) teacher logits of the images.
        views: teacher logits of augmented views, epoch by epoch.
        factor: each image stores factor x factor training images as tiles (`decode`).
        lr: a learned learning rate to train with.
        made_by: the recipe.
        random: as many random real images under the same labels, for DD-Ranking; not saved.
        figures: of its making, such as `distil_seconds`; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "synthetic_set"
    formats: ClassVar[Mapping[str, str]] = {"folder": "imagefolder", "parquet": "train.parquet"}
    images: Tensor
    labels: Tensor
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bounded: bool = False
    whitening: Whitening | None = None
    soft: Tensor | None = None
    views: ViewLabels | None = None
    factor: int = 1
    lr: float | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    random: SyntheticSet | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images, self.labels = self.images.detach().cpu().contiguous(), self.labels.detach().cpu()
        self.check()

    def check(self) -> None:
        """Raises `UserError`, in a sentence, for images, labels or soft labels that cannot be a synthetic set's."""
        x, y, count = self.images, self.labels, len(self.classes)
        if x.ndim != 4 or not len(x):
            raise UserError(f"A synthetic set holds images (N, C, H, W), at least one; given: {tuple(x.shape)}.")
        if x.dtype != torch.float32:
            raise UserError(
                f"A synthetic set holds float32 images; given: {x.dtype}. Divide uint8 images by 255 and normalise "
                "them."
            )
        if self.whitening is None and not len(self.mean) == len(self.std) == x.shape[1]:
            raise UserError(
                f"The normalisation has {len(self.mean)} means and {len(self.std)} deviations, but the images have "
                f"{x.shape[1]} channels."
            )
        broken = int((~x.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise UserError(
                f"{broken} of {len(x)} synthetic images hold NaN or infinite pixels; lower the images' learning rate."
            )
        low, high = float(self.pixels().min()), float(self.pixels().max())
        if self.bounded and (low < -1e-3 or high > 1 + 1e-3):
            raise UserError(
                f"The synthetic images have pixels from {low:.3g} to {high:.3g}, not in [0, 1]; clamp them, or say "
                "that they are not bounded."
            )
        if float(x.abs().max()) > FAR:
            raise UserError(
                f"The synthetic images reach {float(x.abs().max()):.3g} after normalisation; is their learning rate "
                "too high, or were pixels of 0 to 255 taken "
                "for normalised ones?"
            )
        if y.shape != (len(x),) or y.is_floating_point() or y.dtype == torch.bool:
            raise UserError(
                f"{len(x)} synthetic images need labels of shape ({len(x)},) that are class ids; given: "
                f"{tuple(y.shape)}, {y.dtype}."
            )
        if int(y.min()) < 0 or int(y.max()) >= count:
            raise UserError(
                f"The labels run from {int(y.min())} to {int(y.max())}, but there are {count} classes (0 to "
                f"{count - 1})."
            )
        missing = [
            self.classes[c] for c in (torch.bincount(y.long(), minlength=count) == 0).nonzero().flatten().tolist()
        ]
        if missing:
            shown = ", ".join(f"'{m}'" for m in missing[:5]) + (" …" if len(missing) > 5 else "")
            raise UserError(f"The synthetic set has no image of {len(missing)} of its {count} classes: {shown}.")
        stored = (len(x) * self.factor**2, count)
        if self.soft is not None and self.soft.shape != stored:
            raise UserError(
                f"Soft labels must have the shape {stored} (images, classes); given: {tuple(self.soft.shape)}."
            )
        if self.views is not None and self.views.logits.shape[1:] != stored:
            raise UserError(
                f"Soft labels of views must have the shape (epochs, {stored[0]}, {stored[1]}); given: "
                f"{tuple(self.views.logits.shape)}."
            )
        self.labels = y.long()

    def __len__(self) -> int:
        """Stored images."""
        return len(self.images)

    @property
    def bytes(self) -> int:
        """Of what is stored: images, labels and soft labels."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def fingerprint(self) -> str:
        """A hash of what networks are trained on."""
        digest = hashlib.blake2b(digest_size=10)
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def training_images(self) -> tuple[Tensor, Tensor]:
        """(N * factor^2, C, H, W) and (N * factor^2,): what networks are trained on, tiles as whole images."""
        return decode(self.images, self.factor), self.labels.repeat(self.factor**2)

    def prepared(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) of real data as networks trained on this set see them."""
        return x if self.whitening is None else self.whitening(unnormalised(x, self.mean, self.std))

    def pixels(self) -> Tensor:
        """(N, C, H, W): pixels, in [0, 1] where the set is bounded; else they may leave it."""
        return self._pixels_of(self.images)

    def training_pixels(self) -> Tensor:
        """(N * factor^2, C, H, W): the pixels of `training_images`."""
        return self._pixels_of(self.training_images()[0])

    def _pixels_of(self, images: Tensor) -> Tensor:
        return unnormalised(images, self.mean, self.std) if self.whitening is None else self.whitening.invert(images)

    def dataset(self) -> Any:
        """As an ordinary data set (`stillhouse.data.IndexedDataset`): items {input, label, index}, for `Loader` or a
        DataLoader."""
        from stillhouse.data import IndexedDataset

        images, labels = self.training_images()
        return IndexedDataset(
            lambda rows, epoch, seed: images[torch.from_numpy(rows)], labels.numpy(), len(self.classes)
        )

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "images.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self._tensors().items()}, str(temporary))
        meta = {
            "kind": self.kind,
            "format": 1,
            "classes": self.classes,
            "mean": list(self.mean),
            "std": list(self.std),
            "bounded": self.bounded,
            "factor": self.factor,
            "lr": self.lr,
            "views": None if self.views is None else self.views.made.model_dump(mode="json"),
            "made_by": self.made_by,
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))
        (folder / "sheet.png").write_bytes(png(contact_sheet(self.pixels(), self.labels)))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> SyntheticSet:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta = read_meta(folder)
        try:
            t = load_file(str(Path(folder) / "images.safetensors"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"The synthetic set in '{folder}' cannot be read ({error}).") from None
        white = (
            Whitening(t["whitening.mean"], t["whitening.matrix"], t["whitening.inverse"])
            if "whitening.matrix" in t
            else None
        )
        views = None if meta["views"] is None else ViewLabels(Views.model_validate(meta["views"]), t["views"])
        return cls(
            t["images"],
            t["labels"],
            meta["classes"],
            tuple(meta["mean"]),
            tuple(meta["std"]),
            bounded=meta["bounded"],
            whitening=white,
            soft=t.get("soft"),
            views=views,
            factor=meta["factor"],
            lr=meta["lr"],
            made_by=meta["made_by"],
        )

    def export(self, to: str, path: Path) -> list[str]:
        """Write an ImageFolder or one Parquet file (see `stillhouse.synthetic.files`): what networks are trained on,
        tiles as whole images, with pixels rounded to 8 bits and clipped to [0, 1]."""
        images = (self.training_pixels().clamp(0, 1) * 255).round().to(torch.uint8)
        labels = self.training_images()[1].tolist()
        if to == "folder":
            to_folder(images, labels, self.classes, path)
        else:
            to_parquet(images, labels, self.classes, self.soft, path)
        real = (self.made_by.get("data") or {}).get("name", "NAME")
        return [
            f"Wrote {len(images)} images of {len(self.classes)} classes: {path}",
            *self.left_out(to),
            f"Train on it: data: {{name: 'synthetic:{path}', options: {{real: '{real}'}}}}",
        ]

    def left_out(self, to: str) -> list[str]:
        """What files of a format (`folder` or `parquet`) cannot hold of a set, a sentence each."""
        pixels = self.training_pixels()
        clipped = (pixels - pixels.clamp(0, 1)).abs()
        outside = clipped > 1e-3
        out = []
        if bool(outside.any()):
            how = (
                f"{float(outside.double().mean()):.1%} of the pixels lay outside [0, 1], by "
                f"{float(clipped[outside].mean()):.2g} on average"
            )
            out.append(f"{how}, and were clipped; the set itself, synthetic:RUN, keeps them.")
        if self.whitening is not None:
            out.append(
                "The images were learned whitened (zca), and are written as pictures; networks that are trained on "
                "them see them normalised."
            )
        if self.views is not None or (self.soft is not None and to == "folder"):
            note = (
                "; a Parquet file holds those of whole images" if self.soft is not None and self.views is None else ""
            )
            out.append(f"The soft labels are not written{note}.")
        if self.lr is not None:
            out.append(f"The set was learned together with a learning rate to train with: {self.lr:.4g} (SGD).")
        return out

    def _tensors(self) -> dict[str, Tensor]:
        out = {"images": self.images, "labels": self.labels}
        if self.whitening is not None:
            w = self.whitening
            out |= {f"whitening.{k}": getattr(w, k).cpu() for k in ("mean", "matrix", "inverse")}
        if self.soft is not None:
            out["soft"] = self.soft.cpu()
        if self.views is not None:
            out["views"] = self.views.logits.cpu()
        return out
