"""Figures of an encoder of videos: how near its embeddings are to those of whole frames, what captions find by them,
and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.evaluation.cost import times_in_turns
from stillhouse.evaluation.image_text import RANKS, recall
from stillhouse.functional.motion import block_motion
from stillhouse.methods.image_text.residualvit.encoder import VideoEncoder
from stillhouse.randomness import generator
from stillhouse.signals import evaluating

TIMED = 48
"""Frames by which time is measured."""


def compared(
    net: VideoEncoder,
    videos: Sequence[tuple[Tensor, Tensor]],
    text: Tensor,
    text_ids: Tensor,
    cut: float | None,
    seed: int,
) -> dict[str, float]:
    """Of videos, frames (T, C, H, W) with the ids (T,) of their captions:

    `frame_cosine`, of the embeddings of frames that are read in part with those of the whole, and `copied_cosine`, of
    their key frames'; `key_share` of frames that are read whole; retrieval and grounding by interleaved embeddings
    (`interleaved_…`), by those of whole frames (`whole_…`), and by copies of key frames (`copied_…`).

    Args:
        text, text_ids: unit embeddings (N, D) of the captions, and their ids.
    """
    rows: dict[str, list[Tensor]] = {"whole": [], "interleaved": [], "copied": []}
    ids, between, device = [], [], next(net.parameters()).device
    with evaluating(net), torch.no_grad():
        for number, (frames, labels) in enumerate(videos):
            frames = frames.to(device)
            whole = torch.cat([F.normalize(net.get_image_features(x), dim=-1) for x in torch.split(frames, 64)])
            found, keys = net.encode(frames, cut, generator=generator(seed, "patches", number))
            for name, value in (("whole", whole), ("interleaved", found), ("copied", whole[keys])):
                rows[name].append(value.float().cpu())
            ids.append(labels)
            between.append(torch.tensor([k != i for i, k in enumerate(keys)]))
    every, rest = {k: torch.cat(v) for k, v in rows.items()}, torch.cat(between)
    label = torch.cat(ids)
    out = {"key_share": 1 - rest.double().mean().item()}
    for name, figure in (("interleaved", "frame_cosine"), ("copied", "copied_cosine")):
        out[figure] = (every[name] * every["whole"]).sum(1)[rest].double().mean().item()
    for name, embedded in every.items():
        for way, values in (
            ("image_to_text", recall(embedded, text, label, text_ids)),
            ("text_to_image", recall(text, embedded, text_ids, label)),
        ):
            out |= {f"{name}_{way}_r{rank}": value for rank, value in zip(RANKS, values)}
        out[f"{name}_grounding"] = grounding(rows[name], ids, text, text_ids)
    return out


def moment(similarity: Tensor) -> tuple[int, int]:
    """First and last frame of the moment that a caption is about, by its similarity (T,) to the frames: all around the
    most similar one that are above the middle between the least and the most."""
    above = (similarity >= (similarity.min() + similarity.max()) / 2).tolist()
    first = last = int(similarity.argmax())
    while first > 0 and above[first - 1]:
        first -= 1
    while last + 1 < len(above) and above[last + 1]:
        last += 1
    return first, last


def grounding(embedded: Sequence[Tensor], ids: Sequence[Tensor], text: Tensor, text_ids: Tensor) -> float:
    """Share of captions whose moment in a video overlaps the true one, the longest run of frames of its id, by an
    intersection over union of 0.5."""
    hits, count = 0, 0
    of = {int(i): text[n] for n, i in enumerate(text_ids.tolist())}
    for frames, labels in zip(embedded, ids):
        runs: dict[int, tuple[int, int]] = {}
        at = 0
        for label, run in groupby(labels.tolist()):
            end = at + len(list(run)) - 1
            if label not in runs or end - at > runs[label][1] - runs[label][0]:
                runs[label] = (at, end)
            at = end + 1
        for label, (first, last) in runs.items():
            if label not in of:
                continue
            begin, close = moment(frames @ of[label])
            both = max(0, min(last, close) - max(first, begin) + 1)
            hits += both >= 0.5 * (last - first + close - begin + 2 - both)
            count += 1
    return hits / count if count else 0.0


@torch.no_grad()
def costs(net: VideoEncoder, frames: Tensor) -> dict[str, float]:
    """`multiply_adds_share` and `time_share`: of the frames (T, C, H, W) of a video, interleaved, over those of whole
    frames; `whole_frame_ms` and `frame_ms`, of a frame.

    Motion is known before, as codecs know it.
    """
    frames = frames[:TIMED].to(next(net.parameters()).device)
    before = torch.cat([frames[:1], frames[:-1]])
    change = block_motion(frames, before, net.patch) if net.reduction.mode == "motion" else None

    def whole() -> None:
        for some in torch.split(frames, 64):
            net.get_image_features(some)

    def interleaved() -> None:
        net.encode(frames, change=change)

    with evaluating(net):
        counted = []
        for work in (interleaved, whole):
            with FlopCounterMode(display=False) as counter:
                work()
            counted.append(counter.get_total_flops())
        times = times_in_turns({"interleaved": interleaved, "whole": whole}, frames.device)
    return {
        "multiply_adds_share": counted[0] / counted[1],
        "time_share": times["interleaved"] / times["whole"],
        "frame_ms": 1000 * times["interleaved"] / len(frames),
        "whole_frame_ms": 1000 * times["whole"] / len(frames),
    }
