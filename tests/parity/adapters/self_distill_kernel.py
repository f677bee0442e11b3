"""The chain of kernel fits and the script's loss against the arrays of `self_distill_kernel`."""

from __future__ import annotations

import math

import torch

from parity.case import Case
from stillhouse.methods.classification.self_distill_kernel import (
    KernelSelfDistillation,
    sum_of_norms,
    weighted_targets_loss,
)

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def toy(case: Case) -> None:
    p = case.params
    chain = KernelSelfDistillation("rbf", p["rbf_gamma"], p["lambd"], p["steps"], p["alpha"]).fit(case["X"], case["Y"])
    grid = case["x_grid"][:, None]
    case.close("kernel", chain.gram(case["X"]), **EXACT)
    case.close("eigvals", chain.eigenvalues, **EXACT)
    steps = range(1, p["steps"] + 1)
    case.close("train_targets", torch.stack([case["Y"], *(chain.fitted(t) for t in steps)]), **EXACT)
    case.close("grid_preds", torch.stack([chain.predict(grid, t) for t in steps]), **EXACT)
    case.close("grid_pred_limit", chain.predict(grid, "limit"), **EXACT)
    case.close("B_diag", torch.stack([chain.shrinkage(t) for t in steps]), **EXACT)
    case.close("B_limit_diag", chain.shrinkage("limit"), **EXACT)
    truth = torch.sin(2 * math.pi * grid)
    case.close(
        "losses", torch.stack([(chain.predict(grid, t) - truth).square().mean() for t in [*steps, "limit"]]), **EXACT
    )


def dl_step(case: Case) -> None:
    p = case.params
    before = case["teacher_logits"].softmax(-1) if p["distill"] else None
    loss = weighted_targets_loss(case.leaf("pred_logits"), case["labels"], before, p["alpha"])
    regularised = [case[name] for name in sorted(case.arrays) if name.startswith("param")]
    loss = loss + p["reg_coef"] * sum_of_norms(regularised)
    loss.backward()
    case.close("loss", loss, rtol=1e-6)
    case.close_grad("pred_logits", rtol=1e-5)


ADAPTERS = {"toy": toy, "dl_step": dl_step}
