"""One oracle file: arrays of the authors' own code as tensors, its options and weights, and comparisons with what we
compute."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]


def oracle_folder() -> Path:
    """STILLHOUSE_ORACLES, or ../shared/oracles beside the repository."""
    return Path(os.environ.get("STILLHOUSE_ORACLES") or REPOSITORY.parent / "shared" / "oracles")


class Case:
    """The arrays of one `.npz` file.

    `case["name"]` is an array as a tensor (made once, so that its `.grad` is where `close_grad` looks),
    `case.leaf("name")` the same with a gradient, `case.params` the options, `case.weights` the arrays `w:*` by name,
    `"name" in case` whether it is there. `close` and `close_grad` compare.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.slug = path, path.parent.name
        with np.load(path, allow_pickle=False) as file:
            self.arrays: dict[str, np.ndarray] = {k: file[k] for k in file.files}
        self.kind = str(self.arrays.pop("kind"))
        self.params: dict[str, Any] = json.loads(str(self.arrays.pop("params", "{}")))
        self._tensors: dict[str, Tensor] = {}
        self.compared: set[str] = set()

    def __repr__(self) -> str:
        return f"{self.slug}/{self.path.stem}"

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(np.array(self.arrays[name]))
        return self._tensors[name]

    def text(self, name: str) -> str:
        """An array of one string."""
        return str(self.arrays[name])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All arrays named `prefix:*`, by the part after the colon."""
        return {k[len(prefix) + 1 :]: self[k] for k in self.arrays if k.startswith(prefix + ":")}

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.under("w")

    def leaf(self, name: str) -> Tensor:
        """The array as a leaf that collects a gradient."""
        return self[name].requires_grad_()

    def load(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """The module with the weights of the file whose names start with `prefix`, in their precision; every weight
        must fit."""
        weights = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        module.to(next((v.dtype for v in weights.values() if v.is_floating_point()), None)).load_state_dict(weights)
        return module

    @property
    def images(self) -> Tensor:
        """The first array of images; their last three axes are (C, H, W)."""
        return next(self[name] for name in ("x", "x_syn", "x_syn0", "x0") if name in self)

    def close(
        self, name: str, value: Any, *, rtol: float = 1e-5, atol: float | None = None, where: Tensor | None = None
    ) -> None:
        """Assert that `value` is the array `name`: same shape, each entry within rtol of it, or within atol. A file
        without that array says nothing of it.

        atol is for rounding near 0, by default 1e-6 of the largest entry where that is above 1. `where` (bool, same
        shape) leaves entries out.
        """
        if name not in self.arrays:
            return
        self.compared.add(name)
        expected = torch.from_numpy(np.array(self.arrays[name]))
        given = torch.as_tensor(value).detach().cpu()
        assert given.shape == expected.shape, (
            f"{self!r}: {name}: shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
        )
        if not expected.is_floating_point():
            assert torch.equal(given, expected.to(given.dtype)), f"{self!r}: {name}: {given} is not {expected}"
            return
        if where is not None:
            given = torch.where(where, given, expected.to(given.dtype))
        if atol is None:
            atol = 1e-6 * max(1.0, float(expected.abs().nan_to_num(0, 0).max())) if expected.numel() else 0.0
        torch.testing.assert_close(
            given.double(),
            expected.double(),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m: f"{self!r}: {name}: {m}",
        )

    def close_grad(
        self,
        name: str,
        tensor: Tensor | None = None,
        *,
        array: str | None = None,
        rtol: float = 1e-5,
        atol: float | None = None,
    ) -> None:
        """Assert that the gradient collected by a tensor (default: the leaf `name`) is `grad:name` (or `array`), where
        the file has it: of a network in evaluation mode it has none.

        atol defaults to 1e-5 of the largest entry: a small entry of a gradient is a difference of large ones.
        """
        array = array or f"grad:{name}"
        if array not in self.arrays:
            return
        leaf = self[name] if tensor is None else tensor
        assert leaf.grad is not None, f"{self!r}: {name} received no gradient"
        scale = float(np.abs(self.arrays[array]).max(initial=0.0))
        self.close(array, leaf.grad, rtol=rtol, atol=max(1e-5 * scale, 1e-9) if atol is None else atol)
