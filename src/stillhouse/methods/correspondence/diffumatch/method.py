"""DiffuMatch: a denoiser of functional maps, trained on one kind of shape, takes the place of hand-made regularisers
when any two shapes are matched.

paper: DiffuMatch: Category-Agnostic Spectral Diffusion Priors for Robust Non-rigid Shape Matching
venue: ICCV 2025
arxiv: 2507.23715
task: shape matching
family: score distillation
use when: two deformable meshes are to be matched without labels, and it is not known how much to regularise
needs: meshes with a common template to train the denoiser; then any two meshes that stand roughly alike

A functional map C (k, k) takes functions on one mesh to functions on another, in the eigenbases of their Laplacians.
True maps look alike, whatever the shapes: a band around the diagonal that widens. A denoiser learns this look from the
absolute values of known maps. For a new pair it is asked twice. (1) A mask: with noise on |C|, where does it take
entries back? The square root of the mean share of an entry that it removes is the penalty of that entry in the solve.
(2) A direction: a network of features (DiffusionNet) is trained on the pair alone, by the score of its map (score
distillation) and by the distance to the map that ZoomOut makes of the masked one. ZoomOut refines the result.

    stillhouse run recipes/correspondence/diffumatch.yaml
    stillhouse predict runs/diffumatch-s0 first.off second.off --out found

Each run also compares masks on descriptors that are not learned, at several weights: `none_over_diffusion`,
`laplacian_over_diffusion` and `resolvent_over_diffusion` are ratios of errors at the smallest weight, so above 1 the
distilled mask is better; `diffusion_over_best` is its error at its best weight over the best of the other two at
theirs; `weight_spread_…` is the worst error of a mask over its best; `transfer_gain` is the error without a mask over
that with it on deformed ellipsoids, which the denoiser has not seen. `mask_contrast` is the mask far from the diagonal
over the mask near it, and `denoised_…` the error of denoised held-out maps over that of the noisy ones.

Departures and choices. The paper trains on 40,000 bodies, the recipe on the 380 maps between 20. Masks are divided by
their largest entry and weighed in shares of the mean diagonal of A A^T (`match.relative`), so that a weight means the
same for every mask and every kind of feature; the released code does neither. The paper's text has EDM noise, the
released code variance-preserving noise (`denoiser.noise`). The released score distillation compares |C| with a target
that may be negative (`match.form: released`); the default has the gradient that the text describes, at the same scale;
so weighed, it is thousands of times smaller than that of ZoomOut's term, and the recipe weighs it 100 (`match.score`).
ZoomOut sees 1,000 vertices in the loss, which are far from each other, and grows by 5 (`few: null`, `zoom_step: 1`: as
published). The map of the result is computed without dropout.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.spatial import cKDTree
from torch import Tensor

from stillhouse.config.specs import MethodConfig, Spec
from stillhouse.data.mesh_views import drawn, place_colours
from stillhouse.data.meshes import named_mesh
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.methods.correspondence.diffumatch.denoising import (
    Denoiser,
    DenoiserSpec,
    average_decay,
    denoising_ratio,
)
from stillhouse.methods.correspondence.diffumatch.matching import (
    MaskKind,
    MatchSpec,
    PairFit,
    Solved,
    direct,
    mask_contrast,
    refined,
)
from stillhouse.methods.correspondence.diffumatch.product import ShapeMatcher
from stillhouse.methods.correspondence.diffumatch.shapes import (
    Shape,
    assembled,
    computed,
    errors,
    true_map,
)
from stillhouse.randomness import generator, keyed, seed_step
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.gallery import FOLDER, write_pictures
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run

SIDE = 240  # pixels of a picture
MASKS: tuple[MaskKind, ...] = ("diffusion", "laplacian", "resolvent")


class ShapesSpec(Spec):
    """Which meshes."""

    source: str = Field(
        "faust", description="A folder of meshes (.npz with a correspondence, .off, .obj), or ellipsoids (made up)."
    )
    root: str | None = Field(None, description="Folder that holds it; default: as of other data.")
    train: list[str] = Field(description="Meshes between which maps are known, for the denoiser.", min_length=2)
    pairs: list[tuple[str, str]] = Field(default_factory=list, description="Pairs that are matched and judged.")
    test: list[str] = Field(default_factory=list, description="Meshes of which all ordered pairs are, too.")
    eigenpairs: int = Field(128, ge=4, description="Of each mesh's Laplacian.")

    def all_pairs(self) -> list[tuple[str, str]]:
        """All pairs that are matched and judged."""
        return [*self.pairs, *permutations(self.test, 2)]


class MasksSpec(Spec):
    """The comparison of masks on descriptors that are not learned."""

    weights: list[float] = Field([0.01, 0.1, 1.0], min_length=1, description="Weights of the mask, rising.")
    refined: int = Field(60, ge=1, description="Size to which ZoomOut takes each map.")
    ellipsoids: int = Field(4, ge=0, description="Pairs of deformed ellipsoids; 0: none.")


class Config(MethodConfig):
    shapes: ShapesSpec
    size: int = Field(20, ge=2, description="k, of the maps that are denoised and solved for.")
    denoiser: DenoiserSpec = Field(default_factory=DenoiserSpec)
    match: MatchSpec = Field(default_factory=MatchSpec)
    masks: MasksSpec | None = Field(default_factory=MasksSpec, description="null: no comparison of masks.")


SPECTRA = Stage("spectra", "solve for the eigenpairs of each mesh (shared)")
DENOISER = Stage("denoiser", "train the denoiser on the maps between the training meshes (shared)")
MATCH = Stage("match", "train a network of features on each pair, taught by the denoiser")
COMPARED = Stage("masks", "compare masks on descriptors that are not learned (shared)")


class DiffuMatch(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        _check(config)
        steps = config.match.steps * len(config.shapes.all_pairs()) if config.match.features == "network" else 0
        kind = {"denoiser": f"{config.denoiser.form} of maps {config.size} x {config.size}"}
        stages = [SPECTRA, DENOISER.filled(steps=config.denoiser.steps, models=kind), MATCH.filled(steps=steps)]
        return [*stages, COMPARED] if config.masks else stages

    def run(self, config: Config, run: Run) -> ShapeMatcher:
        spec = config.shapes
        tested = sorted({name for pair in spec.all_pairs() for name in pair})
        shapes = {name: _shape(run, spec.source, name, config) for name in dict.fromkeys([*spec.train, *tested])}
        maps = _maps([shapes[name] for name in spec.train], config.size)
        denoiser = _denoiser(run, config, maps)
        figures = _denoised(denoiser, _maps([shapes[name] for name in tested], config.size))
        product = ShapeMatcher(denoiser, config.denoiser, config.size, spec.eigenpairs, config.match)
        seconds, matched = [], []
        for i, (a, b) in enumerate(spec.all_pairs()):
            found = _match(run, config, i, shapes[a], shapes[b], denoiser)
            product.matches[a, b] = found.points
            seconds.append(found.seconds)
            matched.append(found)
        figures |= _means(matched, config.size)
        figures |= {"match_seconds": float(np.mean(seconds)), "train_seconds": float(np.sum(seconds))}
        if config.masks:
            figures |= _compared(run, config, config.masks, shapes, denoiser)
        _draw(run, config, matched)
        product.module = copy.deepcopy(denoiser).cpu()
        product.matches = {pair: points.cpu() for pair, points in product.matches.items()}
        product.figures = figures
        return product


def _check(config: Config) -> None:
    spec = config.shapes
    if config.size >= spec.eigenpairs:
        raise UserError(f"size {config.size} must be below shapes.eigenpairs, which is {spec.eigenpairs}.")
    if config.match.features == "network" and config.match.network.outputs < config.size:
        raise UserError(
            f"match.network.outputs {config.match.network.outputs} must be at least size {config.size}: fewer features "
            "do not settle a map."
        )
    if not spec.all_pairs():
        raise UserError("shapes.pairs and shapes.test name no pair to match.")
    same = [pair for pair in spec.pairs if pair[0] == pair[1]]
    if same:
        raise UserError(f"shapes.pairs has '{same[0][0]}' with itself.")
    config.denoiser.build(config.size)


def _shape(run: Run, source: str, name: str, config: Config) -> Shape:
    """A shape, whose spectrum is a stage."""
    root = Path(config.shapes.root).expanduser() if config.shapes.root else find_root(None, run.data_root)
    mesh, few = named_mesh(source, name, root), config.match.few or 10
    uses = {
        "vertices": mesh.vertices,
        "faces": mesh.faces,
        "eigenpairs": config.shapes.eigenpairs,
        "few": few,
        "form": 2,
    }
    arrays = run.stage(f"{SPECTRA}.{name}", lambda: computed(mesh, config.shapes.eigenpairs, few), uses)
    return assembled(name, mesh, arrays, run.device)


def _maps(shapes: list[Shape], size: int) -> Tensor:
    """(N, k, k) the absolute values of the maps between all ordered pairs."""
    return torch.stack([true_map(a, b, size).abs() for a, b in permutations(shapes, 2)])


def _denoiser(run: Run, config: Config, maps: Tensor) -> Denoiser:
    """The trained denoiser, the average of its weights."""
    spec = config.denoiser

    def make() -> dict[str, Tensor]:
        with keyed("denoiser", run.seed):
            model = spec.build(config.size)
        model.to(run.device)
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr, betas=(0.9, 0.99))

        def step(i: int) -> dict[str, Tensor]:
            chosen = torch.randint(len(maps), (spec.batch_size,), device=maps.device)
            loss = model.loss(maps[chosen][:, None])
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * min(1.0, (i + 1) * spec.batch_size / max(spec.warmup, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept = average_decay(spec, i)
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters()):
                    old.lerp_(new, 1 - kept)
            return {"loss": loss.detach()}

        run.loop(DENOISER, {"model": model, "average": average, "optimizer": optimizer}, step, spec.steps)
        return state_on_cpu(average)

    uses = {"maps": maps, "denoiser": spec, "size": config.size, "seed": run.seed}
    weights = run.stage(DENOISER, make, uses)
    model = spec.build(config.size)
    model.load_state_dict(weights)
    return model.to(run.device).eval().requires_grad_(False)


def _denoised(denoiser: Denoiser, maps: Tensor) -> dict[str, float]:
    """Errors of denoised held-out maps over those of the noisy ones."""
    noise = torch.randn(maps.shape, generator=generator("held-out")).to(maps.device)
    return {f"denoised_{s:g}": float(denoising_ratio(denoiser, maps, s, noise)) for s in (0.1, 0.3, 1.0)}


class _Matched:
    """A pair after its fit: its maps, the point map, that before the fit, and what the fit took."""

    def __init__(self, one: Shape, two: Shape, solved: Solved, learned: bool, spec: MatchSpec) -> None:
        self.one, self.two, self.solved = one, two, solved
        functional = solved.raw if learned else solved.masked
        self.direct = direct(functional, one, two)
        self.points = refined(spec, functional, one, two)[1]
        self.start = self.points
        self.seconds = 0.0


def _match(run: Run, config: Config, i: int, one: Shape, two: Shape, denoiser: Denoiser) -> _Matched:
    spec, stage = config.match, f"{MATCH}.{i}"
    with keyed("features", run.seed, i):
        fit = PairFit(one, two, spec, config.size, denoiser)
    seed_step(run.seed, stage, "start")
    begun = time.monotonic()
    start = _Matched(one, two, fit.result(), False, spec)
    start.seconds = time.monotonic() - begun
    if not fit.learns:
        return start
    state = {"network": fit.network, "optimizer": fit.optimizer}
    seconds = run.loop(stage, state, fit.step, spec.steps, log_every=10)
    seed_step(run.seed, stage, "result")
    found = _Matched(one, two, fit.result(), True, spec)
    found.start, found.seconds = start.points, seconds
    return found


def _means(matched: list[_Matched], size: int) -> dict[str, float]:
    """Means over the pairs of what the evaluator cannot know: before the fit, without ZoomOut, of the true map."""

    def mean(points: list[Tensor]) -> float:
        return float(np.mean([errors(p, m.one.mesh, m.two.mesh).mean() for p, m in zip(points, matched)]))

    out = {
        "geodesic_error_start": mean([m.start for m in matched]),
        "geodesic_error_direct": mean([m.direct for m in matched]),
        "geodesic_error_truth": mean([direct(true_map(m.one, m.two, size), m.one, m.two) for m in matched]),
    }
    masks = [m.solved.mask for m in matched if m.solved.mask is not None]
    if masks:
        out["mask_contrast"] = float(torch.stack([mask_contrast(mask) for mask in masks]).mean())
    return out


def _compared(
    run: Run, config: Config, spec: MasksSpec, shapes: dict[str, Shape], denoiser: Denoiser
) -> dict[str, float]:
    """How masks compare on descriptors that are not learned."""

    def error(one: Shape, two: Shape, mask: MaskKind, weight: float) -> float:
        match = config.match.model_copy(
            update={
                "features": "waves_places",
                "mask": mask,
                "weight": weight,
                "relative": True,
                "refined": spec.refined,
            }
        )
        seed_step(run.seed, str(COMPARED), one.name, two.name)
        found = PairFit(one, two, match, config.size, denoiser).result()
        points = refined(match, found.masked, one, two)[1]
        return float(errors(points, one.mesh, two.mesh, 500).mean())

    def make() -> dict[str, float]:
        pairs = [(shapes[a], shapes[b]) for a, b in config.shapes.all_pairs()]
        found: dict[MaskKind, list[float]] = {
            mask: [float(np.mean([error(*pair, mask, weight) for pair in pairs])) for weight in spec.weights]
            for mask in MASKS
        }
        none = float(np.mean([error(*pair, "none", 0.0) for pair in pairs]))
        out = {f"error_{mask}_{w:g}": e for mask in MASKS for w, e in zip(spec.weights, found[mask])}
        out |= {"error_none": none, "none_over_diffusion": none / found["diffusion"][0]}
        out |= {f"{mask}_over_diffusion": found[mask][0] / found["diffusion"][0] for mask in MASKS[1:]}
        out["diffusion_over_best"] = min(found["diffusion"]) / min(*found["laplacian"], *found["resolvent"])
        out |= {f"weight_spread_{mask}": max(found[mask]) / min(found[mask]) for mask in MASKS}
        if spec.ellipsoids:
            names = [str(i) for i in range(spec.ellipsoids + 1)]
            made = [_shape(run, "ellipsoids", name, config) for name in names]
            others = list(pairwise(made))
            ours, plain = (
                float(np.mean([error(*pair, mask, spec.weights[0]) for pair in others]))
                for mask in ("diffusion", "none")
            )
            out |= {"transfer_error": ours, "transfer_gain": plain / max(ours, 1e-6)}
        return out

    uses = {
        "denoiser": denoiser,
        "shapes": {name: shapes[name].points for pair in config.shapes.all_pairs() for name in pair},
        "pairs": config.shapes.all_pairs(),
        "masks": spec,
        "size": config.size,
        "match": {k: getattr(config.match, k) for k in ("sigma", "draws", "normalise", "ridge", "few", "zoom_step")},
        "eigenpairs": config.shapes.eigenpairs,
        "seed": run.seed,
    }
    found: Mapping[str, Any] = run.stage(COMPARED, make, uses)
    return {name: float(value) for name, value in found.items()}


def _true_points(one: Shape, two: Shape) -> Tensor:
    """(V2,) for each vertex of the second, the true vertex of the first, by the nearest vertex of the template."""
    first, second = one.mesh.correspondence, two.mesh.correspondence
    assert first is not None and second is not None
    nearest = cKDTree(two.mesh.vertices[second]).query(two.mesh.vertices)[1]
    return torch.from_numpy(first[nearest])


def _draw(run: Run, config: Config, matched: list[_Matched]) -> None:
    """Pictures: the first shape coloured by place, the second by what its vertices are matched to, and the mask."""
    columns: dict[str, tuple[list[Tensor], list[str]]] = {"truth": ([], [])}
    learned = config.match.features == "network" and config.match.steps > 0
    for m in matched:
        colours = place_colours(m.one.mesh.vertices)
        shown = {
            "truth": _true_points(m.one, m.two),
            "student": m.points,
            **({"before the fit": m.start} if learned else {}),
        }
        for name, points in shown.items():
            pictures, captions = columns.setdefault(name, ([], []))
            second = drawn(m.two.mesh, colours[points.cpu().numpy()], SIDE)
            first = [drawn(m.one.mesh, colours, SIDE)] if name == "truth" else []
            pictures.append(torch.cat([*first, second], 2))
            error = 100 * float(errors(points, m.one.mesh, m.two.mesh).mean())
            captions.append(f"{m.one.name} and {m.two.name}" if name == "truth" else f"error {error:.2f}")
        if m.solved.mask is not None:
            pictures, captions = columns.setdefault("mask", ([], []))
            pictures.append(_heat(m.solved.mask.cpu()))
            captions.append("penalty of an entry; dark: none")
    write_pictures(run.folder / FOLDER, columns, range(len(matched)), compared=False)


def _heat(mask: Tensor) -> Tensor:
    """(3, side, side) uint8 of a matrix, its largest entry white."""
    image = (mask / mask.max().clamp_min(1e-12) * 255).round().to(torch.uint8)
    large = image.repeat_interleave(SIDE // len(mask), 0).repeat_interleave(SIDE // len(mask), 1)
    return large.expand(3, -1, -1).contiguous()


@evaluates(ShapeMatcher.kind)
def evaluate(product: ShapeMatcher, run: Run) -> dict[str, float]:
    """`geodesic_error`: of the run's pairs after ZoomOut, over the root of the area; and the denoiser's size."""
    config = run.config
    assert isinstance(config, Config)
    spec = config.shapes
    root = Path(spec.root).expanduser() if spec.root else find_root(None, run.data_root)
    meshes = {name: named_mesh(spec.source, name, root) for pair in spec.all_pairs() for name in pair}
    found = [errors(points, meshes[a], meshes[b]).mean() for (a, b), points in product.matches.items()]
    return {
        "geodesic_error": float(np.mean(found)),
        "parameters": float(sum(p.numel() for p in product.module.parameters())),
    }
