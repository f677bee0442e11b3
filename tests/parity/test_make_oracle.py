"""Oracle files that ship with the repository are what their references compute, and any function makes one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.adapters.kd import ADAPTERS
from parity.case import Case
from parity.make_oracle import compute, from_file

SHIPPED = sorted((Path(__file__).parent / "oracles").glob("*/*.npz"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_file_is_what_its_reference_computes(path: Path) -> None:
    computed = from_file(path.with_suffix(".py"))
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored.files) == set(computed)
        for name in stored.files:
            if stored[name].dtype.kind == "f":
                np.testing.assert_allclose(computed[name], stored[name], rtol=1e-6, atol=1e-7, err_msg=name)
            else:
                np.testing.assert_array_equal(computed[name], stored[name], err_msg=name)


def kd_in_torch(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    p, q = (F.log_softmax(z / temperature, 1) for z in (teacher_logits, student_logits))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_torch_reference_gets_its_gradients_by_autograd(tmp_path: Path, wrong: bool) -> None:
    logits = {
        name: torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(("student_logits", "teacher_logits"))
    }
    reference = (lambda **inputs: 1.01 * kd_in_torch(**inputs)) if wrong else kd_in_torch
    arrays = compute("loss", reference, logits, {"temperature": 2.0}, gradients=["student_logits"])
    path = tmp_path / "kd" / "torch.npz"
    path.parent.mkdir()
    np.savez(path, **arrays)
    if wrong:
        with pytest.raises(AssertionError):
            ADAPTERS["loss"](Case(path))
    else:
        ADAPTERS["loss"](Case(path))


def test_weights_and_their_gradients_are_stored_by_name(tmp_path: Path) -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    arrays = compute(
        "regression",
        lambda x: {"y": module(x), "loss": module(x).square().mean()},
        {"x": x},
        gradients=["x"],
        module=module,
    )
    np.savez(tmp_path / "linear.npz", **arrays)
    case = Case(tmp_path / "linear.npz")
    again = case.load(nn.Linear(3, 2))
    y = again(case.leaf("x"))
    y.square().mean().backward()
    case.close("y", y)
    case.close_grad("x")
    case.close_grad("weight", again.weight)


def test_mistakes_in_a_reference_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="name of an input: x"):
        compute("k", lambda x: {"x": x}, {"x": x})
    with pytest.raises(ValueError, match="return it as 'grad:x'"):
        compute("k", lambda x: x.sum(), {"x": x.numpy()}, gradients=["x"])
    with pytest.raises(ValueError, match="output 'loss'"):
        compute("k", lambda x: {"y": x.sum()}, {"x": x}, gradients=["x"])
