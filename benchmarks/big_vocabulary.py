"""Time and memory of losses from hidden states in chunks, beside the plain loss on full logits: `python
benchmarks/big_vocabulary.py`.

Both sides compute loss and gradients of hidden states and output matrix, in turns in one process. Memory is the most
that torch holds beyond hidden states and matrices; the gradients, which both sides must return, are in it. On a CPU
with the sizes below it takes about six minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from run import keep
from torch import Tensor
from torch.nn import functional as F

from stillhouse.evaluation.cost import peak_of_tensors
from stillhouse.functional.chunked import linear_cross_entropy, linear_divergence
from stillhouse.functional.heads import Head
from stillhouse.functional.token_losses import coarse_log_probs, coarse_logits, forward_kl_rows, jsd_rows
from stillhouse.signals import TopK

Loss = Callable[[], Tensor]


def losses(
    tokens: int, vocabulary: int, width: int, teacher_width: int, k: int, device: torch.device
) -> tuple[Head, dict[str, tuple[Loss, Loss]]]:
    """The student's hidden states and matrix, and {loss: (plain, in chunks)}. The plain divergences are written as
    anybody would with torch.nn."""
    made = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=made).to(device)  # noqa: E731
    student = Head(
        random(tokens, width).requires_grad_(), (random(vocabulary, width) * 2 / width**0.5).requires_grad_()
    )
    teacher = Head(random(tokens, teacher_width), random(vocabulary, teacher_width) * 3 / teacher_width**0.5)
    labels = torch.randint(vocabulary, (tokens,), generator=made).to(device)
    log_probs, indices = torch.cat(
        [torch.stack(_top(teacher, part, k)) for part in torch.arange(tokens, device=device).split(64)], dim=1
    )
    top = TopK(log_probs, indices.long(), 1 - log_probs.exp().sum(-1))

    def plain_forward() -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher.logits(), dim=-1)
        return F.kl_div(F.log_softmax(student.logits(), dim=-1), target, reduction="batchmean", log_target=True)

    def plain_reverse() -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher.logits(), dim=-1)
        return F.kl_div(target, F.log_softmax(student.logits(), dim=-1), reduction="batchmean", log_target=True)

    def plain_jsd() -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher.logits(), dim=-1)
        return jsd_rows(student.logits(), target, 0.5).mean()

    def plain_top() -> Tensor:
        return forward_kl_rows(coarse_logits(student.logits(), top.indices), coarse_log_probs(top, vocabulary)).mean()

    return student, {
        "cross_entropy": (
            lambda: F.cross_entropy(student.logits(), labels),
            lambda: linear_cross_entropy(student, labels),
        ),
        "forward_kl": (plain_forward, lambda: linear_divergence(student, teacher, beta=0.0)),
        "reverse_kl": (plain_reverse, lambda: linear_divergence(student, teacher, beta=1.0)),
        "jsd": (plain_jsd, lambda: linear_divergence(student, teacher, beta=0.5)),
        "top_k": (plain_top, lambda: linear_divergence(student, top)),
    }


@torch.no_grad()
def _top(teacher: Head, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_probs, indices = F.log_softmax(F.linear(teacher.hidden[part], teacher.weight), dim=-1).topk(k)
    return log_probs, indices.to(log_probs)  # exact in float32 below 16 million


def compare(student: Head, plain: Loss, chunked: Loss, rounds: int, device: torch.device) -> dict[str, Any]:
    """Ratios of chunked to plain, and the largest difference of gradients relative to the largest gradient."""
    leaves = (student.hidden, student.weight)

    def step(loss: Loss) -> None:
        loss().backward()

    def forget() -> None:
        for x in leaves:
            x.grad = None

    peaks, gradients = [], []
    for loss in (plain, chunked):  # measured while everything is warmed up
        peaks.append(peak_of_tensors(lambda loss=loss: step(loss), device) / 2**20)
        gradients.append([x.grad for x in leaves])
        forget()
    gap = max(float((mine - theirs).abs().max() / theirs.abs().max()) for theirs, mine in zip(*gradients))
    gradients.clear()
    took: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, loss in enumerate((plain, chunked)):
            began = _clock(device)
            step(loss)
            took[side].append(_clock(device) - began)
            forget()
    ratios = [mine / theirs for theirs, mine in zip(*took)]
    return {
        "plain_seconds": statistics.median(took[0]),
        "chunked_seconds": statistics.median(took[1]),
        "time_ratio": statistics.median(ratios),
        "time_least": min(ratios),
        "time_most": max(ratios),
        "plain_mebibytes": peaks[0],
        "chunked_mebibytes": peaks[1],
        "memory_ratio": peaks[1] / peaks[0],
        "gradient_gap": gap,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Compare every loss and keep results/big_vocabulary.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="losses by name; default: all, and only then the figures are kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256, help="of the student's hidden states")
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--top", type=int, default=64, help="k of the sparse teacher")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    student, every = losses(
        options.tokens, options.vocabulary, options.width, options.teacher_width, options.top, device
    )
    rows = {}
    for name in options.only or every:
        rows[name] = compare(student, *every[name], options.rounds, device)
        print(f"{name:<14}", " ".join(f"{k} {v:.3g}" for k, v in rows[name].items()), flush=True)
    if not options.only:
        shape = {k: vars(options)[k] for k in ("tokens", "vocabulary", "width", "teacher_width", "top", "rounds")}
        keep("big_vocabulary", {**shape, "losses": rows}, options.device, options.threads)


if __name__ == "__main__":
    main()
