"""GaussianGrasper: views of an image-language model, distilled into Gaussians that answer words and offer grasps.

paper: GaussianGrasper: 3D Language Gaussian Splatting for Open-vocabulary Robotic Grasping
venue: RA-L 2024
arxiv: 2403.09637
task: scenes
family: feature distillation
use when: things in a scene seen by a few RGB-D views are to be found by words and picked up
needs: posed RGB-D views, masks with a feature each, and a text encoder of the same space; here a table that is known

Gaussians are placed at the points that depth shows, and fitted to colour, depth, normals and features of views. Each
has 32 numbers for a feature instead of the encoder's hundreds. They are distilled in two ways (efficient feature
distillation): pixels of one mask are pulled together in pairs, and about a thousand pixels, as many of each mask, are
lifted by a small network to the encoder's space and compared with the feature of their mask. A query is the relevancy
of lifted features for a text; the points found, with the rendered normals, are what grasps are filtered by: both
contacts must lie in the friction cone, and the gripper's boxes must be free. A moved thing's Gaussians are moved with
it, and those near it are fitted again.

The image encoder is stood in for: a mask's feature is the text encoder's vector of the thing's name (`language`), with
something added that differs from view to view (`feature_noise`), and masks err at their borders; queries are other
words than names. Robots are stood in for by the known surfaces: `antipodal` is the share of chosen grasps whose
contacts truly lie in the cone. `scene.name: folder:PATH` reads views of your own, one .npz file a view.

Reconstructed, as the paper's code for it is not published: the query's score (LERF's), its threshold (0.6 here), the
grasp filter, the proposer of grasps, and the update of a scene. Departures that are options: normals are turned to the
camera (`flip_normals`), and depth is divided by opacity instead of mixed with a background at 10 m
(`depth_background`). Published values that a fit of minutes does not bear: with depth weighed once (in metres), an
opacity of 0.1 at the start and means moved at 1e-3, 600 steps left small things' surfaces about a centimetre too deep;
the recipe begins at 0.9, weighs depth ten times, and draws points of all masks more evenly. The splatting is torch's,
in tiles, and linear in pairs of a tile and a Gaussian.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import MethodConfig, Model, Spec
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.functional.images import PEAK, WINDOW, psnr
from stillhouse.functional.pictures import overlay
from stillhouse.methods.scenes.gaussian_grasper.density import Control, DensitySpec
from stillhouse.methods.scenes.gaussian_grasper.gaussians import Gaussians, Seen, lifting
from stillhouse.methods.scenes.gaussian_grasper.grasping import GraspSpec, choose, holds_truly, propose
from stillhouse.methods.scenes.gaussian_grasper.losses import (
    Drawn,
    Weights,
    color_change,
    color_loss,
    contrastive_loss,
    depth_loss,
    draw_pixels,
    elongation,
    every_pixel,
    lifted_loss,
    normal_loss,
    visible_ids,
)
from stillhouse.methods.scenes.gaussian_grasper.product import GaussianScene, QuerySpec
from stillhouse.methods.scenes.gaussian_grasper.query import CANONICAL, relevancy, text_vectors
from stillhouse.methods.scenes.gaussian_grasper.table import Scene
from stillhouse.methods.scenes.gaussian_grasper.views import (
    SceneSpec,
    Views,
    as_segmented,
    back_projected,
    known_table,
    looked_at,
    places,
    read_folder,
    split,
)
from stillhouse.randomness import generator, keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.gallery import FOLDER, write_pictures
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run

SHOWN = 4
JUDGED_DEPTH = 0.1  # metres from which depth and normals are judged
TIMED = 6  # steps


class GaussiansSpec(Spec):
    """The Gaussians at the start."""

    points: int = Field(1200, ge=4, description="At most so many of the points that depth shows, drawn at random.")
    balance: float = Field(
        0.5, ge=0, le=1, description="Points are drawn by 1 / (pixels of their mask) to this power; 0: all alike."
    )
    heights: tuple[float, float] = Field((-0.02, 0.3), description="z of points that are taken, in metres.")
    depths: tuple[float, float] = Field((0.001, 1.2), description="Depths of points that are taken, in metres.")
    opacity: float = Field(0.1, gt=0, lt=1)
    degree: int = Field(2, ge=0, le=4, description="Of the harmonics of colour.")
    width: int = Field(32, ge=1, description="Numbers of a feature.")
    hidden: list[int] = Field(default_factory=lambda: [128], description="Widths of the lifting network.")


class Rate(Spec):
    """A learning rate that decays exponentially."""

    first: float = Field(gt=0)
    last: float | None = Field(None, gt=0, description="Default: as the first.")

    def at(self, share: float) -> float:
        """After a share of the steps."""
        return self.first * ((self.last or self.first) / self.first) ** share


class Rates(Spec):
    """Of Adam."""

    means: Rate = Field(default_factory=lambda: Rate(first=2e-4, last=2e-6))
    harmonics: Rate = Field(default_factory=lambda: Rate(first=1e-2, last=1e-3))
    features: Rate = Field(default_factory=lambda: Rate(first=3e-2, last=3e-3))
    opacity: Rate = Field(default_factory=lambda: Rate(first=5e-2))
    log_scales: Rate = Field(default_factory=lambda: Rate(first=1e-2, last=1e-3))
    quats: Rate = Field(default_factory=lambda: Rate(first=1e-2, last=1e-3))
    lift: Rate = Field(default_factory=lambda: Rate(first=3e-3, last=3e-4))


class FitSpec(Spec):
    """How Gaussians are fitted."""

    steps: int = Field(600, ge=1, description="Optimiser steps, a view each.")
    rates: Rates = Field(default_factory=Rates)
    accumulate: int = Field(1, ge=1, description="Steps whose gradients of means, colours and features are added up.")
    halved_until: int = Field(50, ge=0, description="Steps for which views have half their pixels a side.")
    degree_every: int = Field(150, ge=1, description="Steps after which the harmonics' degree grows by one.")
    regularise_every: int = Field(10, ge=1, description="Steps between penalties of harmonics and long Gaussians.")
    color: float = Field(1.0, ge=0)
    ssim: float = Field(0.2, ge=0, le=1, description="Share of 1 - SSIM in the colour's term.")
    depth: float = Field(1.0, ge=0)
    normal: float = Field(1.0, ge=0)
    contrast: float = Field(1.0, ge=0, description="Of pairs of pixels of one mask; 0: lifted features alone.")
    lift: float = Field(1.0, ge=0)
    pairs: int = Field(800, ge=1, description="Pixels of a mask that are paired, at most.")
    lift_points: int = Field(1000, ge=1, description="Pixels that are lifted, of each mask as many.")
    lifted: Literal["sampled", "all"] = Field("sampled", description="all: every pixel, as per-pixel regression.")
    flip_normals: bool = Field(True, description="Turn normals to the camera before they are rendered.")
    depth_background: float | None = Field(None, description="Depth behind everything; default: divide by opacity.")
    density: DensitySpec = Field(
        default_factory=lambda: DensitySpec(start=100, end=400, gradient=2e-3, reset=3000),
        description="When Gaussians are made and removed.",
    )

    @property
    def weights(self) -> Weights:
        """Of the terms."""
        return Weights(self.color, self.ssim, self.depth, self.normal, self.contrast, self.lift)


class MoveSpec(Spec):
    """A thing that is moved after the fit."""

    thing: int = Field(1, ge=0, description="Its place in the list of things.")
    shift: tuple[float, float] = Field((0.06, 0.05), description="Along the table, in metres.")
    turn: float = Field(30.0, description="About the vertical, in degrees.")
    steps: int = Field(60, ge=0, description="Of fitting again what lies near.")
    near: float = Field(0.08, gt=0, description="Metres around its old and new middle that are fitted again.")


class Config(MethodConfig):
    scene: SceneSpec = Field(default_factory=SceneSpec, description="What is seen.")
    language: Model | None = Field(None, description="The text encoder; default: a random vector for each text.")
    canonical: list[str] = Field(default_factory=lambda: list(CANONICAL), min_length=1)
    gaussians: GaussiansSpec = Field(default_factory=GaussiansSpec)
    fit: FitSpec = Field(default_factory=FitSpec)
    query: QuerySpec = Field(default_factory=QuerySpec)
    grasp: GraspSpec = Field(default_factory=GraspSpec)
    move: MoveSpec | None = Field(default_factory=MoveSpec, description="null: nothing is moved.")


TEXTS = Stage("texts", "embed names, queries and canonical phrases (stored, shared)")
FIT = Stage("fit", "fit Gaussians to colour, depth, normals and features of the views")
UPDATE = Stage("update", "move a thing, and fit what lies near again")


class GaussianGrasper(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        _check(config)
        stages = [
            TEXTS.filled(models={} if config.language is None else {"language": config.language.model}),
            FIT.filled(steps=config.fit.steps),
        ]
        return [*stages, UPDATE.filled(steps=config.move.steps)] if config.move and _known(config) else stages

    def run(self, config: Config, run: Run) -> GaussianScene:
        train, _, vectors = views_of(config, run)
        train = train.to(run.device)
        with keyed("gaussians", run.seed):
            gaussians = _beginning(config, train).to(run.device)
            lift = lifting(config.gaussians.width, config.gaussians.hidden, train.features.shape[-1]).to(run.device)
        seconds = fit(run, FIT, gaussians, lift, train, config.fit)
        product = _product(config, run, gaussians, lift, train, vectors)
        product.figures = {"train_seconds": seconds, "step_ms": step_ms(config.fit, gaussians, lift, train)}
        product.figures |= {"gaussians": float(len(gaussians))}
        if config.move is not None and _known(config):
            product.figures |= moved(config, run, product, config.move)
        _write_gallery(config, run, product)
        return product


def _known(config: Config) -> bool:
    return not config.scene.name.startswith("folder:")


def _check(config: Config) -> None:
    if _known(config):
        scene = known_table(config.scene)
        if config.move is not None and config.move.thing >= len(scene.placed):
            raise UserError(
                f"move.thing: there is no thing {config.move.thing}; things are 0 to {len(scene.placed) - 1}."
            )
    small = min(config.scene.size) // (2 if config.fit.halved_until else 1)
    if config.fit.ssim and small < WINDOW:
        raise UserError(
            f"fit.ssim looks through windows of {WINDOW} pixels, but views have {small} a side at first; take larger "
            "views in scene.size, fit.halved_until: 0, or fit.ssim: 0."
        )


# ---- views and texts -------------------------------------------------------------------------------------------------


def texts_of(config: Config) -> tuple[list[str], list[str]]:
    """Names of what is seen, by mask id, and queries."""
    if not _known(config):
        return [], list(config.scene.queries)
    scene = known_table(config.scene)
    return scene.names, [p.thing.query for p in scene.placed]


def query_ids(config: Config) -> dict[str, int]:
    """What is asked for -> the id that is right."""
    if not _known(config):
        return dict(config.scene.queries)
    return {p.thing.query: i + 1 for i, p in enumerate(known_table(config.scene).placed)}


def views_of(config: Config, run: Run) -> tuple[Views, Views, dict[str, Tensor]]:
    """Views for the fit, unseen ones, and the vector of each text."""
    spec, root = config.scene, find_root(None, run.data_root)
    names, queries = texts_of(config)
    texts = list(dict.fromkeys([*names, *queries, *config.canonical]))
    found = None
    if not _known(config):
        folder = Path(spec.name.removeprefix("folder:")).expanduser()
        found = read_folder(folder if folder.is_dir() else root / folder)

    def embed() -> dict[str, Tensor]:
        dim = 384 if found is None else found.features.shape[-1]
        return {"vectors": text_vectors(texts, config.language, root, dim)}

    uses = {"texts": texts, "language": config.language, "dim": 0 if found is None else found.features.shape[-1]}
    vectors = dict(zip(texts, run.stage(TEXTS, embed, uses)["vectors"]))
    if config.language is None and found is None:  # random vectors know no likeness of words
        vectors |= {query: vectors[names[i]] for query, i in query_ids(config).items()}
    if found is not None:
        if found.features.shape[-1] != len(next(iter(vectors.values()))):
            raise UserError(
                f"language: texts have {len(next(iter(vectors.values())))} numbers, but the views' features "
                f"{found.features.shape[-1]}; both must come from one image-language model."
            )
        return (*split(found, spec.test_views), vectors)
    scene, by_id = known_table(spec), torch.stack([vectors[name] for name in names])
    train, test = (
        as_segmented(looked_at(scene, places(spec, which)), by_id, spec, which) for which in ("train", "test")
    )
    return train, test, vectors


def _beginning(config: Config, train: Views) -> Gaussians:
    """Gaussians at points of all views."""
    spec = config.gaussians
    points, colors, ids = [], [], []
    for i, camera in enumerate(train.cameras):
        intrinsics = (camera.fx, camera.fy, camera.cx, camera.cy)
        where, kept = back_projected(
            train.depth[i], intrinsics, camera.to_world, train.valid[i], spec.depths, spec.heights
        )
        points.append(where)
        colors.append(train.color[i][kept])
        ids.append(train.masks[i][kept])
    every, paint = torch.cat(points).cpu(), torch.cat(colors).cpu()
    if len(every) < 4:
        raise UserError(
            "gaussians.heights and gaussians.depths leave fewer than four points of the views; widen them (metres)."
        )
    name = torch.cat(ids).cpu() + 1
    share = torch.bincount(name)[name].double()
    keys = torch.rand(len(every), dtype=torch.float64).log() * share**spec.balance  # an exponential race
    chosen = keys.topk(min(spec.points, len(every))).indices
    gaussians = Gaussians(len(chosen), spec.degree, spec.width)
    gaussians.begin(every[chosen], paint[chosen], spec.opacity)
    return gaussians


# ---- the fit ---------------------------------------------------------------------------------------------------------


def terms_of(
    seen: Seen,
    view: Views,
    gaussians: Gaussians,
    lift: nn.Module,
    drawn: Drawn | None,
    spec: FitSpec,
    regularised: bool,
) -> dict[str, Tensor]:
    """The weighted terms of a view, by name.

    Args:
        view: of one camera.
        drawn: pixels for the features' terms; None: the view has no masks.
        regularised: whether the step has the penalties.
    """
    weights, valid = spec.weights, view.valid[0]
    terms = {"color": weights.color * color_loss(seen.color, view.color[0], valid, weights.ssim)}
    if weights.depth:
        terms["depth"] = weights.depth * depth_loss(seen.depth, view.depth[0], valid)
    if weights.normal:
        terms["normal"] = weights.normal * normal_loss(seen.normal, view.normal[0], view.depth[0], valid)
    if drawn is not None and weights.contrast:
        terms["contrast"] = weights.contrast * contrastive_loss(seen.features, drawn)
    if drawn is not None and weights.lift:
        terms["lift"] = weights.lift * lifted_loss(seen.features, view.targets(0, drawn.lifted), drawn, lift)
    if regularised:
        terms["harmonics"] = color_change(gaussians.harmonics)
        terms["elongation"] = weights.ratio * elongation(gaussians.log_scales)
    return terms


class Gradients:
    """Gradients that are added up over steps, for checkpoints."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict[str, Tensor]:
        return {k: p.grad for k, p in self.parameters.items() if p.grad is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            self.parameters[name].grad = value.to(self.parameters[name].device)


class Fitting:
    """The step of a fit.

    Args:
        gaussians, lift: what is fitted.
        views: of the scene.
        spec: how.
        only: (N,) bool, the Gaussians that may change; None: all, whose number may change too.
    """

    ADDED_UP = ("means", "harmonics", "features")

    def __init__(
        self, gaussians: Gaussians, lift: nn.Module, views: Views, spec: FitSpec, only: Tensor | None = None
    ) -> None:
        self.gaussians, self.lift, self.views, self.spec, self.only = gaussians, lift, views, spec, only
        slow = {name: getattr(gaussians, name) for name in self.ADDED_UP}
        fast = {name: p for name, p in gaussians.named_parameters() if name not in slow}
        groups = [{"params": [p], "name": name} for name, p in slow.items()]
        self.slow = torch.optim.Adam(groups, lr=1e-3, eps=1e-15)
        groups = [{"params": [p], "name": name} for name, p in fast.items()]
        groups += [] if only is not None else [{"params": list(lift.parameters()), "name": "lift"}]
        self.fast = torch.optim.Adam(groups, lr=1e-3, eps=1e-15)
        self.gradients = Gradients(slow)
        self.control = Control(gaussians, (self.slow, self.fast), spec.density)
        self.small = [views.halved(i, 1 if spec.halved_until and only is None else 0) for i in range(len(views))]
        self.large = [views.halved(i, 0) for i in range(len(views))]

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; Gaussians first, as the others' sizes are theirs."""
        return {
            "gaussians": self.gaussians,
            "lift": self.lift,
            "slow": self.slow,
            "fast": self.fast,
            "gradients": self.gradients,
            "control": self.control,
        }

    def terms(self, step: int, view: Views, screen: Tensor) -> tuple[dict[str, Tensor], Seen]:
        """The terms of a view at a step."""
        spec = self.spec
        degree = step // spec.degree_every if self.only is None else None
        seen = self.gaussians.seen(
            view.cameras[0], degree, flip=spec.flip_normals, depth_background=spec.depth_background, screen=screen
        )
        drawn = None
        if self.only is None and (spec.contrast or spec.lift):
            ids = visible_ids(view.masks[0], view.valid[0])
            drawn = draw_pixels(ids, view.features.shape[1], spec.pairs, spec.lift_points)
            drawn = every_pixel(ids, drawn) if spec.lifted == "all" else drawn
        regularised = step % spec.regularise_every == 0
        return terms_of(seen, view, self.gaussians, self.lift, drawn, spec, regularised), seen

    def step(self, i: int) -> dict[str, Tensor]:
        """One view, drawn by torch's generator."""
        spec, share = self.spec, i / self.spec.steps
        which = int(torch.randint(len(self.views), ()))
        view = (self.small if i < spec.halved_until else self.large)[which]
        screen = torch.zeros_like(self.gaussians.means[:, :2], requires_grad=True)
        terms, seen = self.terms(i, view, screen)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        if self.only is not None:
            for parameter in self.gaussians.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.only.view(-1, *[1] * (parameter.ndim - 1)))
        elif screen.grad is not None:
            self.control.observe(screen.grad, seen.found, max(view.cameras[0].width, view.cameras[0].height))
        for optimizer in (self.slow, self.fast):
            for group in optimizer.param_groups:
                group["lr"] = getattr(spec.rates, group["name"]).at(share)
        self.fast.step()
        self.fast.zero_grad()
        if i % spec.accumulate == spec.accumulate - 1:
            self.slow.step()
            self.slow.zero_grad()
        if self.only is None:
            self.control.after(i)
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


def fit(run: Run, stage: Stage, gaussians: Gaussians, lift: nn.Module, views: Views, spec: FitSpec) -> float:
    """Fit Gaussians and the lifting network to views. Seconds."""
    fitting = Fitting(gaussians, lift, views, spec)
    return run.loop(stage, fitting.state, fitting.step, spec.steps)


def step_ms(spec: FitSpec, gaussians: Gaussians, lift: nn.Module, views: Views) -> float:
    """CPU time of a step's forward and backward pass, the least of some; wall-clock time on a GPU."""
    fitting = Fitting(copy.deepcopy(gaussians), copy.deepcopy(lift), views, spec)
    on_cpu = gaussians.means.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    taken = []
    with keyed("cost"):
        for i in range(TIMED):
            start = clock()
            screen = torch.zeros_like(gaussians.means[:, :2], requires_grad=True)
            terms, _ = fitting.terms(spec.steps, fitting.large[i % len(views)], screen)
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()
            float(loss.detach())  # waits for the device
            taken.append(clock() - start)
    return 1000 * min(taken)


# ---- what is left ----------------------------------------------------------------------------------------------------


def _product(
    config: Config, run: Run, gaussians: Gaussians, lift: nn.Sequential, train: Views, vectors: Mapping[str, Tensor]
) -> GaussianScene:
    camera = train.cameras[0]
    known = {text: vectors[text] for text in query_ids(config)}
    return GaussianScene(
        copy.deepcopy(gaussians).cpu().eval().requires_grad_(False),
        copy.deepcopy(lift).cpu().eval().requires_grad_(False),
        list(config.gaussians.hidden),
        torch.stack([vectors[text] for text in config.canonical]),
        known,
        config.language,
        config.query,
        config.fit.flip_normals,
        torch.stack([c.view.cpu() for c in train.cameras]),
        [camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height],
        config.scene.radius,
    )


@torch.no_grad()
def view_figures(product: GaussianScene, views: Views) -> dict[str, float]:
    """`psnr_views` in dB, `depth_error` in mm and `normal_error` in degrees, means over views and valid pixels."""
    colors, depths, angles = [], [], []
    for i, camera in enumerate(views.cameras):
        seen = product.seen(camera)
        counted = views.valid[i] & (views.depth[i] > JUDGED_DEPTH)
        colors.append(seen.color.clamp(0, 1) * views.valid[i][..., None])
        depths.append((seen.depth - views.depth[i]).abs()[counted])
        cosine = (F.normalize(seen.normal, dim=-1) * views.normal[i]).sum(-1)[counted]
        cosine = cosine if product.flip else cosine.abs()
        angles.append(torch.rad2deg(cosine.clamp(-1, 1).acos()))
    truth = views.color * views.valid[..., None]
    return {
        "psnr_views": float(psnr(torch.stack(colors) * PEAK, truth * PEAK).mean()),
        "depth_error": 1000 * float(torch.cat(depths).mean()),
        "normal_error": float(torch.cat(angles).mean()),
    }


@torch.no_grad()
def query_figures(product: GaussianScene, views: Views, queries: Mapping[str, int]) -> dict[str, float]:
    """`miou_queries`: of what a query finds in unseen views and the thing's true pixels; `miou_teacher`: the same of
    the masks' own features in these views; `separation`: of rendered features, the mean cosine within things less
    that between."""
    seen = [product.seen(camera) for camera in views.cameras]
    ours, theirs = [], []
    for text, right in queries.items():
        truth = views.truth == right
        found = torch.stack([product.mask(s, text) for s in seen])
        targets = torch.stack([views.targets(i) for i in range(len(views))])
        spec = product.query
        relevant = relevancy(targets, product.vector(text), product.canonical, spec.temperature)
        ours.append(_iou(found, truth))
        theirs.append(_iou((relevant > spec.threshold) & (views.masks >= 0), truth))
    rows = torch.cat([F.normalize(s.features[t >= 0], dim=-1) for s, t in zip(seen, views.truth)])
    ids = views.truth[views.truth >= 0]
    means = torch.stack([rows[ids == i].mean(0) for i in ids.unique().tolist()])
    gram, k = means @ means.T, len(means)
    within = float(gram.diag().mean())
    between = float((gram.sum() - gram.diag().sum()) / max(1, k * (k - 1)))
    mean = {"miou_queries": sum(ours) / len(ours), "miou_teacher": sum(theirs) / len(theirs)} if ours else {}
    return {**mean, "separation": within - between}


def _iou(found: Tensor, truth: Tensor) -> float:
    return float((found & truth).sum()) / max(1, int((found | truth).sum()))


def grasp_figures(product: GaussianScene, scene: Scene, spec: GraspSpec, seed: int) -> dict[str, float]:
    """Of grasps that are chosen among proposals: `antipodal`, the share whose contacts truly lie in the friction cone;
    `antipodal_score`, the same of those that the score alone chooses; `antipodal_gain`, the difference; `free`, the
    share that truly touches nothing else; and `grasped`, the share of proposals in which one was feasible. Of a thing
    that is not found, none is, and the score's would not hold."""
    samples = product.samples()
    everything = product.surface(samples=samples)
    chosen: list[float] = []
    scored: list[float] = []
    free: list[float] = []
    tried = feasible = 0
    plain = spec.model_copy(update={"filter": False})
    for placed in scene.placed:
        text = placed.thing.query
        try:
            found = product.surface(text, samples)
        except UserError:
            tried += spec.rounds
            scored += [0.0] * spec.rounds
            continue
        for number in range(spec.rounds):
            grasps = propose(found.points, spec, generator(seed, "grasps", text, number))
            good, clear = holds_truly(grasps, placed, scene, spec)
            tried += 1
            best = choose(grasps, found.points, found.normals, everything.points, plain).index
            scored.append(float(good[best]))
            try:
                index = choose(grasps, found.points, found.normals, everything.points, spec).index
            except UserError:
                continue
            feasible += 1
            chosen.append(float(good[index]))
            free.append(float(clear[index]))
    antipodal, score = sum(chosen) / max(1, len(chosen)), sum(scored) / tried
    out = {"antipodal": antipodal, "antipodal_score": score, "antipodal_gain": antipodal - score}
    return {**out, "free": sum(free) / max(1, len(free)), "grasped": feasible / tried}


@evaluates(GaussianScene.kind)
def evaluate(product: GaussianScene, run: Run) -> dict[str, float]:
    """Figures of unseen views, of queries, and of grasps where the scene is known."""
    config = run.config
    assert isinstance(config, Config)
    _, test, _ = views_of(config, run)
    figures = view_figures(product, test) | query_figures(product, test, query_ids(config))
    if _known(config):
        figures |= grasp_figures(product, known_table(config.scene), config.grasp, config.seed)
    parameters = sum(p.numel() for m in (product.gaussians, product.lift) for p in m.parameters())
    return {**figures, "parameters": float(parameters)}


def moved(config: Config, run: Run, product: GaussianScene, spec: MoveSpec) -> dict[str, float]:
    """Move a thing in the scene and its Gaussians in the field, and fit what lies near again: PSNR on unseen views of
    the new scene of the old field (`psnr_stale`), after the move (`psnr_moved`), and after the fit (`psnr_updated`);
    `psnr_gain_of_move` is the second less the first."""
    before = known_table(config.scene)
    placed = before.placed[spec.thing]
    shift, turn = torch.tensor([*spec.shift, 0.0]), torch.deg2rad(torch.tensor(spec.turn))
    after = before.with_moved(spec.thing, shift, float(turn))
    train, test = (looked_at(after, places(config.scene, which)) for which in ("train", "test"))
    field = copy.deepcopy(product)
    figures = {"psnr_stale": view_figures(field, test)["psnr_views"]}
    which = field.gaussians_of(placed.thing.query)
    figures["moved_gaussians"] = float(which.sum())
    c, s = float(turn.cos()), float(turn.sin())
    rotation = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    field.gaussians.move(which, rotation, shift, placed.centre)
    figures["psnr_moved"] = view_figures(field, test)["psnr_views"]
    middles = torch.stack([placed.centre, placed.centre + shift])
    near = torch.cdist(field.gaussians.means, middles).amin(1) < spec.near
    near |= which
    gaussians = field.gaussians.to(run.device).requires_grad_(True)
    again = config.fit.model_copy(update={"steps": max(1, spec.steps), "accumulate": 1, "halved_until": 0})
    fitting = Fitting(gaussians, field.lift.to(run.device), train.to(run.device), again, near.to(run.device))
    if spec.steps:
        run.loop(UPDATE, {"gaussians": gaussians, "slow": fitting.slow, "fast": fitting.fast}, fitting.step, spec.steps)
    field.gaussians.cpu().requires_grad_(False)
    field.lift.cpu()
    figures["psnr_updated"] = view_figures(field, test)["psnr_views"]
    return {**figures, "psnr_gain_of_move": figures["psnr_moved"] - figures["psnr_stale"]}


@torch.no_grad()
def _write_gallery(config: Config, run: Run, product: GaussianScene) -> None:
    """Unseen views beside the truth, their normals, and a query's mask in each."""
    _, test, _ = views_of(config, run)
    queries = list(query_ids(config).items())
    columns: dict[str, tuple[list[Tensor], list[str]]] = {
        name: ([], []) for name in ("truth", "rendered", "normals", "asked", "found")
    }
    for i in range(min(SHOWN, len(test))):
        seen = product.seen(test.cameras[i])
        here = [(q, k) for q, k in queries if bool((test.truth[i] == k).any())] or queries
        truth, image = (_bytes(x * test.valid[i][..., None]) for x in (test.color[i], seen.color))
        value = float(psnr(image.float()[None], truth.float()[None]))
        shown = [(truth, ""), (image, f"{value:.2f} dB"), (_bytes(0.5 + 0.5 * seen.normal), "")]
        if here:
            text, right = here[i % len(here)]
            asked, found = test.truth[i] == right, product.mask(seen, text)
            shown += [(overlay(truth, asked.long(), 2), text)]
            shown += [(overlay(image, found.long(), 2), f"{text}: IoU {_iou(found, asked):.2f}")]
        for (pictures, captions), (picture, caption) in zip(columns.values(), shown):
            pictures.append(picture)
            captions.append(caption)
    columns = {name: value for name, value in columns.items() if value[0]}
    columns["truth"] = (columns["truth"][0], [])
    write_pictures(run.folder / FOLDER, columns, range(min(SHOWN, len(test))), compared=False)


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * PEAK).round().to(torch.uint8).movedim(-1, 0).cpu()
