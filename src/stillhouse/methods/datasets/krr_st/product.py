"""`RepresentationSet`: a few unlabelled images with target representations, from which anyone pre-trains a backbone by
plain regression."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.runs.products import Product, read_meta
from stillhouse.synthetic.files import contact_sheet, png
from stillhouse.synthetic.real import unnormalised


@dataclass
class RepresentationSet(Product):
    """The product of KRR-ST.

    Attributes:
        images: X_s (m, C, H, W) float32, fed to a network as they are.
        targets: Y_s (m, d) float32.
        mean, std: of the normalisation of real images.
        made_by: the recipe.
        figures: of its making; saved with the run, not with the product.

    Raises:
        UserError: shapes that do not fit, integers, or values that are not finite.
    """

    kind: ClassVar[str] = "stillhouse.methods.datasets.krr_st:RepresentationSet"
    images: Tensor
    targets: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    made_by: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images, self.targets = (t.detach().cpu().contiguous() for t in (self.images, self.targets))
        x, y = self.images, self.targets
        if x.ndim != 4 or not len(x) or y.ndim != 2 or len(y) != len(x):
            raise UserError(
                f"A set of representations holds images (m, C, H, W) and targets (m, d); given: {tuple(x.shape)} and "
                f"{tuple(y.shape)}."
            )
        if x.dtype != torch.float32 or y.dtype != torch.float32:
            raise UserError(
                f"A set of representations holds float32 images and targets; given: {x.dtype} and {y.dtype}."
            )
        for name, tensor in (("images", x), ("targets", y)):
            broken = int((~tensor.isfinite()).flatten(1).any(1).sum())
            if broken:
                raise UserError(
                    f"{broken} of {len(x)} synthetic {name} hold NaN or infinite values; lower the learning rate."
                )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bytes(self) -> int:
        """Of images and targets."""
        return 4 * (self.images.numel() + self.targets.numel())

    @property
    def fingerprint(self) -> str:
        """A hash of what networks are trained on."""
        digest = hashlib.blake2b(digest_size=10)
        for tensor in (self.images, self.targets):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "images.safetensors") as temporary:
            save_file({"images": self.images, "targets": self.targets}, str(temporary))
        meta = {"kind": self.kind, "format": 1, "mean": list(self.mean), "std": list(self.std), "made_by": self.made_by}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))
        pixels = unnormalised(self.images, self.mean, self.std) if self.made_by.get("start") != "raw" else self.images
        (folder / "sheet.png").write_bytes(png(contact_sheet(pixels, torch.arange(len(pixels)))))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> RepresentationSet:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta = read_meta(folder)
        try:
            t = load_file(str(Path(folder) / "images.safetensors"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"The set of representations in '{folder}' cannot be read ({error}).") from None
        return cls(t["images"], t["targets"], tuple(meta["mean"]), tuple(meta["std"]), meta["made_by"])
