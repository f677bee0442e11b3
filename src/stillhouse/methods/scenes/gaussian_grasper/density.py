"""Density control: Gaussians that the image pulls at are split or doubled, and faint or huge ones are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.methods.scenes.gaussian_grasper.gaussians import NAMES, Gaussians
from stillhouse.nn.splatting import Projected, reach, rotations

SHRINK = 1.6
SPLIT = 2


class DensitySpec(Spec):
    """When Gaussians are made and removed."""

    start: int = Field(500, ge=0, description="The first step at which it may happen.")
    end: int = Field(15000, ge=0, description="The first step at which it may not; 0: never.")
    every: int = Field(100, ge=1, description="Steps between two times.")
    gradient: float = Field(2e-4, gt=0, description="Mean gradient of a place, in half images, beyond which.")
    size: float = Field(0.01, gt=0, description="Scale beyond which one is split, and up to which doubled.")
    screen: float = Field(0.05, gt=0, description="Share of the image beyond which it is split, until `screen_until`.")
    screen_until: int = Field(4000, ge=0)
    faint: float = Field(0.1, ge=0, lt=1, description="Opacity below which one is removed.")
    huge: float = Field(0.5, gt=0, description="Scale beyond which one is removed, after the first reset.")
    huge_screen: float = Field(0.15, gt=0, description="The same of the share of the image, before `screen_until`.")
    reset: int = Field(3000, ge=1, description="Steps between resets of opacity.")
    reset_to: float = Field(0.08, gt=0, lt=1, description="The opacity that none exceeds after a reset.")
    most: int = Field(200_000, ge=1, description="Gaussians beyond which none is made.")


class Control:
    """What the image pulled at since the last time, and the surgery on Gaussians and their optimiser.

    Args:
        gaussians: whose number changes.
        optimizers: theirs.
        spec: when.
    """

    def __init__(self, gaussians: Gaussians, optimizers: Sequence[torch.optim.Optimizer], spec: DensitySpec) -> None:
        self.gaussians, self.optimizers, self.spec = gaussians, optimizers, spec
        self._clear()

    def _clear(self) -> None:
        count, device = len(self.gaussians), self.gaussians.means.device
        self.pull, self.times, self.extent = (torch.zeros(count, device=device) for _ in range(3))

    def state_dict(self) -> dict[str, Any]:
        return {"pull": self.pull, "times": self.times, "extent": self.extent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.gaussians.means.device
        self.pull, self.times, self.extent = (state[k].to(device) for k in ("pull", "times", "extent"))

    @torch.no_grad()
    def observe(self, gradient: Tensor, found: Projected, side: int) -> None:
        """Take the gradient (N, 2) of places in an image whose longer side has `side` pixels."""
        far = reach(found, self.gaussians.opacity.sigmoid()).amax(-1)
        self.pull += gradient.norm(dim=-1) * 0.5 * side
        self.times += far > 0
        self.extent = torch.maximum(self.extent, far / side)

    def due(self, step: int) -> bool:
        """Whether Gaussians are made and removed after a step (from 0)."""
        spec = self.spec
        return spec.start <= step < spec.end and step % spec.every == 0 and step > 0

    def after(self, step: int) -> None:
        """What is due after a step (from 0): new Gaussians, removal, the reset of opacity."""
        if self.due(step):
            self.refine(step)
            if step % self.spec.reset == 0:
                self.reset()

    @torch.no_grad()
    def refine(self, step: int) -> None:
        """Split, double and remove. The host reads which."""
        g, spec = self.gaussians, self.spec
        scale = g.log_scales.exp().amax(-1)
        pulled = self.pull / self.times.clamp_min(1) > spec.gradient
        room = spec.most - len(g)
        large = scale > spec.size
        if step < spec.screen_until:
            large = large | (self.extent > spec.screen)
        split, double = pulled & large, pulled & ~large
        if int(split.sum() + double.sum()) > room:
            split, double = torch.zeros_like(split), torch.zeros_like(double)
        out = split | (g.opacity.sigmoid() < spec.faint)
        if step > spec.reset:
            out |= scale > spec.huge
            if step < spec.screen_until:
                out |= self.extent > spec.huge_screen
        made = {name: [getattr(g, name)[double]] for name in NAMES}
        turns, widths = rotations(g.quats[split]), g.log_scales[split]
        for _ in range(SPLIT):
            offset = (turns @ (widths.exp() * torch.randn_like(widths))[..., None])[..., 0]
            for name in NAMES:
                value = getattr(g, name)[split]
                if name == "means":
                    value = value + offset
                if name == "log_scales":
                    value = value - torch.log(torch.tensor(SHRINK))
                made[name].append(value)
        if bool(out.all()) and not any(len(v) for v in made["means"]):
            self._clear()
            return  # nothing would be left
        self._replace(~out, {name: torch.cat(parts) for name, parts in made.items()})
        self._clear()

    def _replace(self, left: Tensor, made: Mapping[str, Tensor]) -> None:
        """Leave some and add others, whose state in the optimiser is 0."""
        g = self.gaussians
        g.resize({name: torch.cat([getattr(g, name).detach()[left], made[name]]) for name in NAMES})
        for name in NAMES:
            state = self._state(name)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = torch.cat([value[left], torch.zeros_like(made[name])])

    def _state(self, name: str) -> dict[str, Any]:
        """What the optimisers hold of a parameter."""
        parameter = getattr(self.gaussians, name)
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), {})

    @torch.no_grad()
    def reset(self) -> None:
        """Let no opacity exceed `reset_to`."""
        most = torch.tensor(self.spec.reset_to).logit().item()
        self.gaussians.opacity.clamp_(max=most)
        state = self._state("opacity")
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[key] = torch.zeros_like(value)
