"""`SparseGenerator`: a few-step student with its sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.generation.judging import evaluate as evaluate_generator
from stillhouse.generation.product import Generator
from stillhouse.methods.generation.video_blade.attention import AdaptiveAttention, Sparsity
from stillhouse.models.dit import DiT
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run


class SparsitySpec(Spec):
    """Adaptive block-sparse attention."""

    block: int = Field(128, ge=1, description="Tokens of a block.")
    sampled: int = Field(32, ge=1, description="Tokens of each block by which blocks are compared.")
    least: float = Field(0.05, gt=0, le=1, description="Share of the blocks that queries attend to, at least.")
    most: float = Field(0.17, gt=0, le=1, description="And at most.")
    energy: float = Field(0.95, gt=0, le=1, description="Share of the estimated attention that the kept blocks hold.")
    inclusive: bool = Field(
        False,
        description="Keep the block that reaches that share too, as the paper has it; false: one less, as its code.",
    )
    window: int = Field(30, ge=0, description="Tokens whose mean stands for them in the global branch; 0: no branch.")
    order: Literal["hilbert", "raster"] = Field("hilbert", description="Of the tokens, which makes blocks.")
    gather: bool = Field(False, description="Compute kept scores alone: for thousands of tokens.")

    def mix(self, grid: tuple[int, int, int], **changes: Any) -> AdaptiveAttention:
        """What attentions of a grid of tokens do. Raises `UserError` for what does not go together."""
        facts = self.model_dump(exclude={"order", "gather"}) | changes
        order = facts.pop("order", self.order)
        return AdaptiveAttention(Sparsity(**facts), grid, order, self.gather)


def as_dit(module: nn.Module) -> DiT:
    """The network, whose attention can be replaced. Raises `UserError` for another."""
    if not isinstance(module, DiT):
        raise UserError(
            f"Video-BLADE replaces the attention of stillhouse:dit; the base model is a {type(module).__name__}."
        )
    return module


def make_sparse(module: nn.Module, spec: SparsitySpec) -> None:
    """Give every attention of a network a sparse one of its own."""
    net = as_dit(module)
    for attention in net.attentions:
        attention.mix = spec.mix(net.grid).to(attention.q.weight.device).train(net.training)


@dataclass
class SparseGenerator(Generator):
    """The product of Video-BLADE.

    Attributes:
        sparsity: of its attention, which is computed at every call; None: dense.
    """

    kind: ClassVar[str] = "stillhouse.methods.generation.video_blade:SparseGenerator"
    sparsity: SparsitySpec | None = None

    def extras(self) -> dict[str, Any]:
        return {"sparsity": None if self.sparsity is None else self.sparsity.model_dump(mode="json")}

    @classmethod
    def restored(cls, meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        return {"sparsity": None if meta["sparsity"] is None else SparsitySpec.model_validate(meta["sparsity"])}

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> SparseGenerator:
        product = super().load(folder, trust_code)
        assert isinstance(product, SparseGenerator)
        if product.sparsity is not None:
            make_sparse(product.module, product.sparsity)
        return product


@evaluates(SparseGenerator.kind)
def evaluate(product: SparseGenerator, run: Run) -> dict[str, float]:
    """As of every generator."""
    return evaluate_generator(product, run)
