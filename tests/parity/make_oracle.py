"""Write an oracle file from any function: its inputs, options and weights, what it returns, and gradients.

A reference is a Python file that computes a published loss without Stillhouse, such as `oracles/kd/by_numpy.py`:

    KIND       which function of the adapter `adapters/<slug>.py` reads the file
    PARAMS     options, as JSON data, passed to `reference` by keyword
    arrays()   inputs by name, NumPy arrays or tensors
    reference  a function of the arrays and options, which returns arrays by name, or one value, stored as `loss`
    GRADIENTS  (optional) inputs, tensors, whose gradients of `loss` are stored; a NumPy reference returns `grad:NAME`
    MODULE     (optional) an `nn.Module` that `reference` uses: weights are stored as `w:NAME`, gradients as `grad:NAME`

    python tests/parity/make_oracle.py tests/parity/oracles/kd/by_numpy.py

writes `by_numpy.npz` next to it, and the parity test compares Stillhouse with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

Arrays = Mapping[str, Any]


def compute(
    kind: str,
    reference: Callable[..., Any],
    arrays: Arrays,
    params: Mapping[str, Any] | None = None,
    gradients: Sequence[str] = (),
    module: nn.Module | None = None,
) -> dict[str, np.ndarray]:
    """All arrays of an oracle file; the arguments are those of a reference file.

    Raises:
        ValueError: an output with the name of an input, gradients of NumPy arrays, or of outputs without a `loss`.
    """
    params = dict(params or {})
    inputs = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in arrays.items()}
    for name in gradients:
        if not isinstance(inputs[name], Tensor):
            raise ValueError(f"'{name}' is no tensor, so it has no gradient: return it as 'grad:{name}'.")
        inputs[name].requires_grad_()
    weights = {} if module is None else {f"w:{name}": _numpy(value) for name, value in module.state_dict().items()}
    returned = reference(**inputs, **params)
    outputs = dict(returned) if isinstance(returned, Mapping) else {"loss": returned}
    taken = sorted({"kind", "params", *inputs} & set(outputs))
    if taken:
        raise ValueError(f"An output has the name of an input: {', '.join(taken)}.")
    if gradients or module is not None:
        if "loss" not in outputs:
            raise ValueError("Gradients are those of the output 'loss', which the reference does not return.")
        outputs["loss"].backward()
        leaves = {name: inputs[name] for name in gradients} | dict(
            module.named_parameters() if module is not None else ()
        )
        outputs |= {f"grad:{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    numbers = {name: _numpy(value) for name, value in {**inputs, **outputs}.items()}
    return {"kind": np.array(kind), "params": np.array(json.dumps(params)), **numbers, **weights}


def _numpy(value: Any) -> np.ndarray:
    """A copy in memory of its own, so that what changes later does not change it."""
    return np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def from_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays that a reference file computes."""
    spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    given = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(given)
    options = vars(given)
    return compute(
        given.KIND,
        given.reference,
        given.arrays(),
        options.get("PARAMS"),
        options.get("GRADIENTS", ()),
        options.get("MODULE"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the oracle file of a reference, next to it.")
    parser.add_argument("reference", type=Path, help="a Python file, such as tests/parity/oracles/kd/by_numpy.py")
    path: Path = parser.parse_args().reference
    arrays = from_file(path)
    np.savez(path.with_suffix(".npz"), **arrays)
    for name, value in arrays.items():
        print(f"{name:<24} {value.dtype} {value.shape}" if value.ndim else f"{name:<24} {value}")


if __name__ == "__main__":
    main()
