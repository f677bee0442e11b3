"""TransKD: a small pyramid transformer learns a large one's stage maps and patch embeddings, without pre-training.

paper: TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation
venue: IEEE T-ITS 2024
arxiv: 2202.13393
task: segmentation
family: features
use when: student and teacher are pyramid transformers of equal strides (SegFormer, PVTv2), the student without weights
needs: four stages of student and teacher, and the patch embeddings at the entrance of each

Cross-selective fusion (CSF) mixes each stage of the student with the deeper ones and predicts the teacher's map,
compared by the hierarchical context loss; patch-embedding alignment (PEA) maps the student's tokens, after their norm
and before the blocks, to the teacher's width and takes the mean squared error with weights 0.1, 0.1, 0.5 and 1. Variant
`gl` mixes the last stage's tokens first (self-attention and a gated convolution), `ea` adds tokenizers of the teacher's
width. Stands beside `ce`; neither labels nor logits are read. Its layers are trained with the student and are no part
of it. The released code leaves the two scalars of `gl` uninitialised; here both start at 0.5. Of networks of timm, name
the embeddings: `patch_embed`, `stages.1.downsample`, …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.hierarchical_context import hcl_loss
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals

Variant = Literal["base", "gl", "ea"]
STAGES = ["stage:1", "stage:2", "stage:3", "stage:4"]
EMBEDDINGS = [f"{stage}.patch_embeddings" for stage in STAGES]
EMBEDDING_WEIGHTS = [0.1, 0.1, 0.5, 1.0]


@full_precision
def embedding_loss(predicted: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i MSE(p_i, e_i) of tokens (B, N_i, T_i), each the mean over everything (section III-C)."""
    stages = zip(predicted, teacher, weights, strict=True)
    terms = [w * F.mse_loss(p.float(), e.detach().float()) for p, e, w in stages if w]
    return torch.stack(terms).sum()


class SelectiveFusion(nn.Module):
    """One unit of cross-selective fusion (section III-B): a stage's map and the fused deeper ones, weighed channel by
    channel.

    Args:
        in_channels: S_i, width of the student's stage.
        width: m, of the fused maps.
        out_channels: T_i, width of the teacher's stage.
        squeezed: width between the pooled maps and the weights; None for the deepest stage, which fuses nothing.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, squeezed: int | None) -> None:
        super().__init__()
        self.reduce = _convolution(in_channels, width, 1)
        self.predict = _convolution(width, out_channels, 3)
        self.choose: nn.ModuleList | None = None
        if squeezed is not None:
            self.squeeze = nn.Sequential(nn.Conv2d(width, squeezed, 1, bias=False), nn.BatchNorm2d(squeezed), nn.ReLU())
            self.squeeze_one = nn.Sequential(nn.Conv2d(width, squeezed, 1, bias=False), nn.ReLU())
            self.choose = nn.ModuleList(nn.Conv2d(squeezed, width, 1) for _ in range(2))

    def forward(self, x: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction of the teacher's map (B, T_i, H, W), and the fused map (B, m, H, W) for the stage above.

        Args:
            x: the student's stage (B, S_i, H, W).
            deeper: the fused map of the stage below, (B, m, ·, ·).
        """
        x = self.reduce(x)
        if self.choose is None or deeper is None:
            return self.predict(x), x
        y = F.interpolate(deeper, x.shape[2:], mode="nearest")
        v = self._squeezed((x + y).mean((2, 3), keepdim=True))
        alpha = torch.stack([layer(v) for layer in self.choose]).softmax(0)
        fused = alpha[0] * x + alpha[1] * y
        return self.predict(fused), fused

    def _squeezed(self, u: Tensor) -> Tensor:
        """(B, m, 1, 1) -> (B, squeezed, 1, 1). One sample has no batch statistics: it takes a layer without a norm."""
        used, other = (self.squeeze_one, self.squeeze) if len(u) == 1 else (self.squeeze, self.squeeze_one)
        idle = torch.stack([p.sum() for p in other.parameters()]).sum()  # distributed training waits for its gradient
        out: Tensor = used(u) + 0.0 * idle
        return out


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels))


class CrossSelectiveFusion(nn.Module):
    """CSF over all stages, deep to shallow.

    Args:
        student_widths, teacher_widths: of the stages, shallow to deep.
        width: m.
        reduction, least: the weights are computed from max(m // reduction, least) numbers.
    """

    def __init__(
        self,
        student_widths: Sequence[int],
        teacher_widths: Sequence[int],
        width: int = 64,
        reduction: int = 16,
        least: int = 32,
    ) -> None:
        super().__init__()
        squeezed, deepest = max(width // reduction, least), len(student_widths) - 1
        pairs = enumerate(zip(student_widths, teacher_widths, strict=True))
        units = (SelectiveFusion(s, width, t, None if i == deepest else squeezed) for i, (s, t) in pairs)
        self.units = nn.ModuleList(units)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, S_i, H_i, W_i) of the stages, shallow to deep -> predictions (B, T_i, H_i, W_i)."""
        out, passed = [], None
        for unit, x in reversed(list(zip(self.units, maps, strict=True))):
            predicted, passed = unit(x, passed)
            out.append(predicted)
        return out[::-1]


class GlobalLocalMixer(nn.Module):
    """a MHSA(e) + c GLU(e) of tokens (B, N, C), with learned scalars a and c (section III-D); MHSA is global, the gated
    convolution along tokens local.

    Args:
        width: C.
        heads: of the attention; divides C.
        residual: add e.
    """

    def __init__(self, width: int, heads: int = 8, residual: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"transkd: heads {heads} must divide the width {width} of the student's last embeddings.")
        self.heads, self.residual = heads, residual
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.value, self.gate = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.attention_weight = nn.Parameter(torch.full((1,), 0.5))
        self.convolution_weight = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        rows, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width))
        across = tokens.transpose(1, 2)
        gated = (self.value(across) * self.gate(across).sigmoid()).transpose(1, 2)
        mixed: Tensor = self.attention_weight * attended + self.convolution_weight * gated
        return mixed + tokens if self.residual else mixed


class Tokenizer(nn.Module):
    """Overlapping patches of a map as tokens with a layer norm: a 7x7 convolution of stride 4, or 3x3 of stride 2."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        out: Tensor = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return out


class PatchEmbeddingAlignment(nn.Module):
    """The student's patch embeddings in the teacher's widths: PEA, with its variants.

    Args:
        student_widths, teacher_widths: S_i and T_i of the stages, shallow to deep.
        variant: `base`; `gl`, a mixer before the last stage's linear map; `ea`, tokenizers of the teacher's width on
            the image and on the student's maps.
        channels: of the image, for `ea`.
        heads, residual: of the mixer of `gl`.
    """

    def __init__(
        self,
        student_widths: Sequence[int],
        teacher_widths: Sequence[int],
        variant: Variant = "base",
        channels: int = 3,
        heads: int = 8,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(s, t) for s, t in zip(student_widths, teacher_widths, strict=True))
        self.mixer = GlobalLocalMixer(student_widths[-1], heads, residual) if variant == "gl" else None
        self.assistants: nn.ModuleList | None = None
        if variant == "ea":
            seen = zip([channels, *student_widths[:-1]], teacher_widths)
            self.assistants = nn.ModuleList(Tokenizer(c, t, 2 if i else 4) for i, (c, t) in enumerate(seen))
            self.own_weights = nn.ParameterList(torch.tensor([0.1 + 0.1 * i]) for i in range(len(self.project)))
            self.assistant_weights = nn.ParameterList(torch.tensor([0.5 + 0.1 * i]) for i in range(len(self.project)))

    def forward(
        self,
        embeddings: Sequence[Tensor],
        image: Tensor | None = None,
        maps: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Tokens (B, N_i, S_i) of the stages -> (B, N_i, T_i).

        Args:
            embeddings: shallow to deep.
            image: (B, channels, H, W), for `ea`.
            maps: of the student's stages (B, S_i, H_i, W_i), for `ea`; the last is not read.
        """
        last = len(embeddings) - 1
        mixed = [self.mixer(e) if self.mixer is not None and i == last else e for i, e in enumerate(embeddings)]
        out = [layer(e) for layer, e in zip(self.project, mixed, strict=True)]
        if self.assistants is None:
            return out
        assert image is not None, "the embedding assistant reads the image"
        helped = [tokenizer(x) for tokenizer, x in zip(self.assistants, [image, *maps])]
        for i, (p, q) in enumerate(zip(out, helped)):
            if p.shape != q.shape:
                raise UserError(
                    f"transkd: the assistant of stage {i + 1} makes {q.shape[1]} tokens where the student has "
                    f"{p.shape[1]}; variant ea is for tokenizers of strides 4, 2, 2, …"
                )
        return [u * p + v * q for u, p, v, q in zip(self.own_weights, out, self.assistant_weights, helped, strict=True)]


class TransKD(Objective):
    """Distillation of stage maps and patch embeddings.

    Args:
        variant: `base`, `gl` (global-local mixer) or `ea` (embedding assistant).
        student_layers, teacher_layers: the stages, shallow to deep, pair by pair.
        student_embeddings, teacher_embeddings: where each stage's tokens are, after their norm and before the blocks.
        feature_weight: of the maps; 0 leaves CSF out.
        embedding_weights: of the embeddings, stage by stage; all 0 leaves PEA out.
        width: m of CSF.
        reduction, least: the weights of CSF are computed from max(width // reduction, least) numbers.
        heads, residual: of the mixer of `gl`.
    """

    name = "transkd"

    def __init__(
        self,
        variant: Variant = "base",
        student_layers: list[str] = STAGES,
        teacher_layers: list[str] = STAGES,
        student_embeddings: list[str] = EMBEDDINGS,
        teacher_embeddings: list[str] = EMBEDDINGS,
        feature_weight: float = 1.0,
        embedding_weights: list[float] = EMBEDDING_WEIGHTS,
        width: int = 64,
        reduction: int = 16,
        least: int = 32,
        heads: int = 8,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise unknown("transkd variant", variant, get_args(Variant))
        checks.same_layers("transkd", student_layers, teacher_layers)
        checks.same_layers("transkd", student_embeddings, teacher_embeddings)
        if not len(student_layers) == len(student_embeddings) == len(embedding_weights):
            raise UserError(
                "transkd: each stage has a layer, an embedding and an embedding weight; given: "
                f"{len(student_layers)} student_layers, {len(student_embeddings)} student_embeddings and "
                f"{len(embedding_weights)} embedding_weights."
            )
        checks.options(
            "transkd",
            positive={"width": width, "reduction": reduction, "least": least, "heads": heads},
            non_negative={"feature_weight": feature_weight, "the least of embedding_weights": min(embedding_weights)},
        )
        if not feature_weight and not any(embedding_weights):
            raise UserError("transkd: feature_weight and all embedding_weights are 0, so nothing would be distilled.")
        self.variant: Variant = variant
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)
        self.student_embeddings, self.teacher_embeddings = list(student_embeddings), list(teacher_embeddings)
        self.feature_weight, self.embedding_weights = feature_weight, list(embedding_weights)
        self.width, self.reduction, self.least, self.heads, self.residual = width, reduction, least, heads, residual
        needs = set()
        if feature_weight:
            needs |= {f"student.tap:{s}" for s in student_layers} | {f"teacher.tap:{t}" for t in teacher_layers}
        if any(embedding_weights):
            needs |= {f"student.tap:{s}" for s in student_embeddings} | {f"teacher.tap:{t}" for t in teacher_embeddings}
            needs |= {"input", *(f"student.tap:{s}" for s in student_layers[:-1])} if variant == "ea" else set()
        self.needs = frozenset(needs)

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        if self.feature_weight:
            maps = _maps(student, self.student_layers), _maps(teacher, self.teacher_layers)
            self._check_maps(*maps)
            mine, theirs = (_widths(m, 1) for m in maps)
            self.fusion = CrossSelectiveFusion(mine, theirs, self.width, self.reduction, self.least)
        if any(self.embedding_weights):
            tokens = _tokens(student, self.student_embeddings), _tokens(teacher, self.teacher_embeddings)
            self._check_tokens(*tokens)
            channels = _image(batch).shape[1] if self.variant == "ea" else 0
            mine, theirs = (_widths(t, 2) for t in tokens)
            self.alignment = PatchEmbeddingAlignment(mine, theirs, self.variant, channels, self.heads, self.residual)

    def _aligned(self, student: Signals, batch: Batch) -> list[Tensor]:
        """The student's tokens in the teacher's widths."""
        tokens = _tokens(student, self.student_embeddings)
        if self.variant != "ea":
            return self.alignment(tokens)
        return self.alignment(tokens, _image(batch), _maps(student, self.student_layers[:-1]))

    def _check_maps(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        for (mine, s), (theirs, t) in zip(zip(self.student_layers, student), zip(self.teacher_layers, teacher)):
            if s.shape[2:] != t.shape[2:]:
                raise UserError(
                    f"transkd: the student's '{mine}' is a map of {tuple(s.shape[2:])} but the teacher's '{theirs}' of "
                    f"{tuple(t.shape[2:])}; the stages of both must have the same strides."
                )
            if len(s) * s.shape[2] * s.shape[3] == 1:
                raise UserError(
                    f"transkd: one image whose '{mine}' is a single pixel has no batch statistics; "
                    "take a batch of 2, or larger images."
                )

    def _check_tokens(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        for (mine, s), (theirs, t) in zip(zip(self.student_embeddings, student), zip(self.teacher_embeddings, teacher)):
            if s.shape[1] != t.shape[1]:
                raise UserError(
                    f"transkd: '{mine}' of the student holds {s.shape[1]} tokens but '{theirs}' of the teacher "
                    f"{t.shape[1]}; the tokenizers of both must have the same strides."
                )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms = {}
        if self.feature_weight:
            predicted = self.fusion(_maps(student, self.student_layers))
            losses = [hcl_loss(g, f) for g, f in zip(predicted, _maps(teacher, self.teacher_layers), strict=True)]
            terms["features"] = self.feature_weight * torch.stack(losses).sum()
        if any(self.embedding_weights):
            theirs = _tokens(teacher, self.teacher_embeddings)
            terms["embeddings"] = embedding_loss(self._aligned(student, batch), theirs, self.embedding_weights)
        return terms


def _maps(signals: Signals, layers: list[str]) -> list[Tensor]:
    """Maps (B, C, H, W), shallow to deep."""
    return [map_tap(signals, layer) for layer in layers]


def _tokens(signals: Signals, layers: list[str]) -> list[Tensor]:
    """Tokens (B, N, C), shallow to deep; timm's tokenizers give them as maps."""
    taps = [signals.require(f"tap:{layer}") for layer in layers]
    for layer, x in zip(layers, taps):
        if x.ndim not in (3, 4):
            raise UserError(f"transkd: '{layer}' gives {tuple(x.shape)}, but embeddings are (B, N, C) or (B, C, H, W).")
    return [x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for x in taps]


def _widths(tensors: Sequence[Tensor], axis: int) -> list[int]:
    return [x.shape[axis] for x in tensors]


def _image(batch: Batch) -> Tensor:
    """The images (B, C, H, W) of a batch."""
    given = batch["input"]
    image: Tensor = given if isinstance(given, Tensor) else given["pixel_values"]
    return image
