"""The two problems of KRR-ST (arXiv 2310.06511): the outer loss, by kernel ridge regression on features, and the pool
of networks that learn the set.

Both are regressions with mean squared error, so that nothing random is inside the inner problem and gradients of the
synthetic data are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.models.anatomy import classifier


class Regressor(nn.Module):
    """A backbone, whose classifier is removed, and a linear head of `dim` outputs.

    Args:
        network: any classifier.
        shape: of one image, (C, H, W).
        dim: outputs of the head; 0: no head, features are all there is.
        cut: the classifier's dotted name; None finds it.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], dim: int, cut: str | None = None) -> None:
        super().__init__()
        probe = torch.zeros(2, *shape)
        parent, _, name = (cut or classifier(network, {"input": probe})).rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
        self.body = network
        before = network.training
        network.eval()
        with torch.no_grad():
            self.features = self.embed(probe).shape[1]
        network.train(before)
        self.head = nn.Linear(self.features, dim) if dim else nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, p)."""
        out: Tensor = self.body(x)
        return out.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim)."""
        out: Tensor = self.head(self.embed(x))
        return out


@full_precision
def ridge_prediction(synthetic: Tensor, targets: Tensor, real: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """K_rs (K_ss + lam I)^-1 Y_s (b, d) and lam = ridge * trace(K_ss), with K = F F^T of features and a column of ones;
    solved in float64.

    Gradients go to the synthetic features and targets, not through lam.

    Args:
        synthetic: (m, p) features of the synthetic images.
        targets: (m, d) their representations Y_s.
        real: (b, p) features of real images.

    Raises:
        UserError: shapes that do not fit, or an empty batch.
    """
    if (
        synthetic.ndim != 2
        or real.ndim != 2
        or targets.ndim != 2
        or len(targets) != len(synthetic)
        or real.shape[1] != synthetic.shape[1]
    ):
        raise UserError(
            "krr_st regresses targets (m, d) on features (m, p) and predicts for features (b, p); "
            f"given: {tuple(targets.shape)}, {tuple(synthetic.shape)} and {tuple(real.shape)}."
        )
    if not len(synthetic) or not len(real):
        raise UserError(
            f"krr_st needs at least one synthetic and one real image; given: {len(synthetic)} and {len(real)}."
        )
    f_s, f_r = (F.pad(f.double(), (0, 1), value=1.0) for f in (synthetic, real))
    gram = f_s @ f_s.T
    lam = ridge * gram.detach().diagonal().sum()
    solved = torch.linalg.solve(
        gram + lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), targets.double()
    )
    return (f_r @ (f_s.T @ solved)).to(targets.dtype), lam.to(targets.dtype)


def outer_loss(
    network: Any, images: Tensor, targets: Tensor, real: Tensor, representations: Tensor, ridge: float = 1e-6
) -> dict[str, Tensor]:
    """`loss`, the mean squared error of the ridge prediction for real images, with `lam` and the features `synthetic`
    and `real`.

    Args:
        network: a `Regressor` in evaluation mode.
        images, targets: X_s (m, C, H, W) and Y_s (m, d).
        real, representations: (b, C, H, W) and (b, d), both without gradient.
    """
    with torch.no_grad():
        f_r = network.embed(real)
    f_s = network.embed(images)
    predicted, lam = ridge_prediction(f_s, targets, f_r, ridge)
    return {"loss": F.mse_loss(predicted, representations.detach()), "lam": lam, "synthetic": f_s, "real": f_r}


def outer_optimizer(images: Tensor, targets: Tensor, lr: float) -> torch.optim.Optimizer:
    """AdamW without decay over both."""
    return torch.optim.AdamW([images, targets], lr, weight_decay=0.0)


def inner_optimizer(
    network: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-3
) -> torch.optim.Optimizer:
    """SGD of the inner problem and of pre-training."""
    return torch.optim.SGD(network.parameters(), lr, momentum=momentum, weight_decay=weight_decay)


def inner_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor) -> Tensor:
    """One step on the mean squared error of all synthetic images, in training mode; returns the loss."""
    network.train()
    loss = F.mse_loss(network(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Pool:
    """Networks of different ages, each trained on the synthetic set as it is; one that has had `limit` steps is
    initialised again.

    Args:
        make: (slot, generation) -> a fresh network on its device.
        count: networks.
        limit: steps until a restart.
        lr, weight_decay: of the inner problem.
        literal: as the released code, which never resets the count, so that a network that has reached the limit is a
            fresh, untrained one at every later visit.
    """

    def __init__(
        self,
        make: Callable[[int, int], nn.Module],
        count: int,
        limit: int,
        lr: float = 0.1,
        weight_decay: float = 1e-3,
        literal: bool = False,
    ) -> None:
        self.make, self.limit, self.lr, self.weight_decay, self.literal = make, limit, lr, weight_decay, literal
        self.steps, self.generations = [0] * count, [0] * count
        self.networks = [make(slot, 0) for slot in range(count)]
        self.optimizers = [self._optimizer(n) for n in self.networks]
        self.sound = [
            torch.tensor(True) for _ in range(count)
        ]  # read at the slot's next visit, so that no step waits for it

    def __len__(self) -> int:
        return len(self.networks)

    def visit(self, slot: int) -> nn.Module:
        """The network of a slot in evaluation mode; a fresh one where the old one has diverged."""
        if not bool(self.sound[slot]):
            self._renew(slot)
            self.steps[slot] = 0
        return self.networks[slot].eval()

    def learn(self, slot: int, images: Tensor, targets: Tensor) -> Tensor:
        """One inner step, or a restart where the slot is at its limit.

        Returns the inner loss, 0 at a restart or where it is not finite.
        """
        if self.steps[slot] >= self.limit:
            self._renew(slot)
            if not self.literal:
                self.steps[slot] = 0
            return targets.new_zeros(())
        loss = inner_step(self.networks[slot], self.optimizers[slot], images, targets)
        self.steps[slot] += 1
        state = (t for t in self.networks[slot].state_dict().values() if t.is_floating_point())
        self.sound[slot] = torch.stack([loss.isfinite(), *(t.isfinite().all() for t in state)]).all()
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "generations": list(self.generations),
            "networks": [n.state_dict() for n in self.networks],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "sound": list(self.sound),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.generations, self.sound = (
            list(state["steps"]),
            list(state["generations"]),
            list(state["sound"]),
        )
        for mine, saved in ((self.networks, state["networks"]), (self.optimizers, state["optimizers"])):
            _load_each(mine, saved)

    def _renew(self, slot: int) -> None:
        self.generations[slot] += 1
        self.networks[slot] = self.make(slot, self.generations[slot])
        self.optimizers[slot] = self._optimizer(self.networks[slot])
        self.sound[slot] = torch.tensor(True)

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return inner_optimizer(network, self.lr, weight_decay=self.weight_decay)


def _load_each(mine: Iterable[Any], saved: Iterable[Any]) -> None:
    for item, state in zip(mine, saved, strict=True):
        item.load_state_dict(state)
