"""AutoDistil: one training, without labels, makes all sizes of a text encoder; then the best that is cheap enough is
cut out.

paper: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models
venue: NeurIPS 2022
arxiv: 2201.12507
task: compression of text encoders
family: architecture search, relations of tokens
use when: a text encoder is wanted at several costs, and nobody knows which depth and width to give up
needs: an encoder of BERT's kind (transformers); text without labels; labels only for the fine-tuning at the end

The teacher's dimensions are cut into small spaces, each with shared weights of its own, which start as the teacher's. A
sub-network has the leading entries of every weight and evenly spread layers; its heads stay as wide as the teacher's.
Each step trains the largest, the smallest and two drawn sub-networks of a space, whose gradients add up. Their last
layer's relations of queries, keys and values (dot products of tokens, head by head) match those of the teacher's last
layer: scaled scores, as the released code has it, or their softmax, as the paper writes (`relation.kind`). Relations
need no projection, labels or logits, so that the same loss on held-out text ranks all sub-networks: the one with the
least under `search.max_cost` is cut out, with weights of its own, and fine-tuned. `search.choose: proxy` fine-tunes the
sub-networks of `rank` instead and takes the one that is best at the task.

Published: spaces of 256 around BERT-base, text of 128 tokens, all pairs of positions counted. Here the padding of
shorter texts is left out of the loss by default. Weight decay, as published, also shrinks entries that no sub-network
has. A cut network is of its transformers class, but unless its hidden size is heads x head size, only `stillhouse.load`
can build it. Training the shared weights as masked language models, which the paper finds weaker, is not here.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from stillhouse.config.specs import Data, DataSpec, MethodConfig, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.statistics import rank_correlation
from stillhouse.methods.distillation import describe
from stillhouse.methods.language.autodistil.networks import SuperNet, cut_out, shaped, whole_of
from stillhouse.methods.language.autodistil.space import Space, SubNet, Whole, spread
from stillhouse.methods.language.autodistil.training import Kind, Padding, RelationTeacher, Sandwich
from stillhouse.models import load_weights
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.tasks.base import Task
from stillhouse.tasks.tokens import AUTO, MODEL, Tokens


class RelationSpec(Spec):
    """What is compared of the last layers."""

    kind: Kind = Field("scores", description="scores: scaled dot products (released code); softmax: equation 4.")
    heads: int | None = Field(None, ge=1, description="Relation heads; null: the teacher's attention heads.")
    padding: Padding = Field("left_out", description="counted: pairs with padded tokens count, as published.")
    weights: tuple[float, float, float] = Field((1.0, 1.0, 1.0), description="Of queries, keys and values.")


class SearchSpec(Spec):
    """Which sub-network is cut out."""

    max_cost: float = Field(
        0.5,
        gt=0,
        description="Multiply-adds of the layers on a text of data.options.context tokens, of the teacher's.",
    )
    choose: Literal["relation", "proxy", "random", "largest", "smallest"] = Field(
        "relation",
        description="relation: the least distance; proxy: the best of `rank`; random: one drawn within 10 % of the "
        "cost of the least distance; largest, smallest: by cost. All under max_cost.",
    )
    batches: int = Field(4, ge=1, description="Batches of held-out text that sub-networks are compared on.")
    batch_size: int = Field(32, ge=1)


class RankSpec(Spec):
    """Sub-networks that are fine-tuned alike, to see whether the distance ranks them as the task does."""

    candidates: int = Field(10, ge=2, description="How many, evenly from the smallest to the largest.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="Of each.")


class SubNetSpec(Spec):
    """The shape of one sub-network."""

    depth: int
    hidden: int
    ratio: float
    heads: int


class Config(MethodConfig):
    data: Data = Field(description="The task: text to be classified, or masked text.")
    unlabelled: Data | None = Field(None, description="Text for the shared weights, of the same tokenizer; null: data.")
    teacher: Teacher = Field(description="An encoder of BERT's kind with the head of the task.")
    spaces: dict[str, Space] = Field(min_length=1, description="Spaces by name, each with shared weights of its own.")
    relation: RelationSpec = Field(default_factory=RelationSpec)
    between: int = Field(2, ge=0, description="Sub-networks drawn at each step, besides the largest and the smallest.")
    train: TrainSpec | None = Field(
        default_factory=TrainSpec, description="Of the shared weights of each space; null: they stay the teacher's."
    )
    search: SearchSpec = Field(default_factory=SearchSpec)
    weights: Literal["shared", "teacher", "random"] = Field(
        "shared",
        description="What the sub-network starts its fine-tuning from: the shared weights, the teacher's, or none.",
    )
    compare: SubNetSpec | None = Field(
        None, description="A shape whose distance is reported; it need not be in a space, so it may be one never drawn."
    )
    rank: RankSpec | None = None
    fine_tune: TrainSpec | None = Field(default_factory=TrainSpec, description="On data, with labels; null: none.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _proxy_needs_rank(self) -> Config:
        if self.search.choose == "proxy" and self.rank is None:
            raise ValueError("search.choose: proxy takes the best of `rank`, which is not given")
        return self

    @property
    def text(self) -> DataSpec:
        """What the shared weights are trained on."""
        return self.unlabelled or self.data


@dataclass(frozen=True)
class Found:
    """A sub-network of a space with its distance from the teacher, and its cost over the teacher's."""

    space: str
    net: SubNet
    distance: float
    cost: float


class AutoDistil(Method[Config]):
    searches = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        task = run.data(config.data, Tokens).task
        check_groups(task, config.evaluate)
        if task.kind not in ("classify", "masked"):
            raise UserError(
                f"autodistil is for encoders, but data.options.task is {task.kind}; set it to masked or classify."
            )
        vocabularies = [run.data(spec, Tokens).task.tokenizer.get_vocab() for spec in (config.data, config.text)]
        if vocabularies[0] != vocabularies[1]:
            raise UserError("unlabelled: its tokenizer is not that of data; give both the same data.options.tokenizer.")
        if run.validation(config.text) is None:
            raise UserError(
                "Sub-networks are compared on held-out text, and there is none: set "
                f"{'data' if config.unlabelled is None else 'unlabelled'}.val to a share above 0."
            )
        spec = config.teacher
        teacher = run.model(spec.network, spec.data or config.data, "teacher", spec.seed or 0)
        stages, whole = [], whole_of(teacher)
        if spec.train is not None and spec.checkpoint is None:
            batches = steps(run, spec.data or config.data, spec.train)
            named = {"teacher": describe(spec.network.model, teacher)}
            stages.append(Stage("teacher", "train the teacher (stored, shared)", named, steps=batches))
        for name, space in config.spaces.items():
            count = len(space.members(whole, f"spaces.{name}"))
            if config.train is not None:
                does = f"train the shared weights of {count} sub-networks, space '{name}' (stored, shared)"
                stages.append(Stage("supernet", does, steps=steps(run, config.text, config.train)))
        stages.append(Stage("search", "compare all sub-networks with the teacher on held-out text (stored, shared)"))
        if config.rank is not None:
            stages.append(Stage("rank", f"fine-tune {config.rank.candidates} sub-networks alike (stored, shared)"))
        if config.fine_tune is not None:
            batches = steps(run, config.data, config.fine_tune)
            stages.append(Stage("student", "fine-tune the sub-network that was found", steps=batches))
        return stages

    def run(self, config: Config, run: Run) -> SubNetStudent:
        teacher = run.network("teacher", config.teacher, config.data).to(run.device)
        whole = whole_of(teacher)
        spaces = {name: space.members(whole, f"spaces.{name}") for name, space in config.spaces.items()}
        supernets = {name: self.supernet(config, run, name, nets, teacher) for name, nets in spaces.items()}
        found, figures = self.compared(config, run, spaces, supernets, teacher)
        ranked: list[tuple[Found, float]] = []
        if config.rank is not None:
            ranked = self.ranked(config, config.rank, run, found, supernets, teacher)
            figures["spearman_task"] = rank_correlation([f.distance for f, _ in ranked], [a for _, a in ranked])
        chosen = choice(config.search, found, ranked, run.seed)
        figures |= {"distance": chosen.distance, "cost_share": chosen.cost}
        run.record["sub_network"] = {"space": chosen.space, "shape": str(chosen.net)}
        with keyed("scratch", run.seed):
            source = {
                "shared": lambda: with_encoder(teacher, supernets[chosen.space]),
                "teacher": lambda: teacher,
                "random": lambda: shaped(teacher, whole, whole.itself),
            }[config.weights]()
        network = cut_out(source, whole, chosen.net)
        if config.fine_tune is not None:
            figures["train_seconds"] = tuned(run, "student", network, config.data, config.fine_tune)
        run.record["weights"] = {"teacher": FrozenTeacher(teacher).fingerprint()}
        plain = run.student(network.to(run.device), config.teacher.network, config.data, figures)
        return SubNetStudent(plain.module, plain.model, plain.task, plain.figures, chosen.net, whole)

    @staticmethod
    def supernet(config: Config, run: Run, name: str, nets: list[SubNet], teacher: nn.Module) -> SuperNet:
        """The trained shared weights of one space."""
        made, train = SuperNet(teacher), config.train
        made.requires_grad_(True)
        if train is None:
            return made.to(run.device)

        def make() -> dict[str, Any]:
            module = Sandwich(
                made,
                nets,
                RelationTeacher(teacher, config.relation.heads),
                config.relation.kind,
                config.relation.padding,
                config.relation.weights,
                config.between,
                offset=1_000_003 * run.seed,
            )
            run.fit("supernet", module, run.loader(config.text, "train", train.batch_size, train=True), train)
            return state_on_cpu(made.encoder)

        uses = {**shared_uses(config, run, teacher), "space": config.spaces[name], "seed": run.seed}
        made.encoder.load_state_dict(run.stage(f"supernet.{name}", make, uses))
        return made.to(run.device)

    @staticmethod
    def compared(
        config: Config,
        run: Run,
        spaces: Mapping[str, list[SubNet]],
        supernets: Mapping[str, SuperNet],
        teacher: nn.Module,
    ) -> tuple[list[Found], dict[str, float]]:
        """All sub-networks with their distances on held-out text, and the figures of that."""
        whole, search = whole_of(teacher), config.search
        shape = None if config.compare is None else SubNet(**config.compare.model_dump())
        if shape is not None:
            whole.check(shape, "compare")
        split = "val" if run.data(config.text).has("val") else "holdout"

        def make() -> dict[str, Any]:
            loader = run.loader(config.text, split, search.batch_size)
            batches = [batch for _, batch in zip(range(search.batches), loader)]
            relations, start = RelationTeacher(teacher, config.relation.heads), SuperNet(teacher).to(run.device)
            options = config.relation.kind, config.relation.padding, config.relation.weights, config.between
            out: dict[str, Any] = {}
            for name, nets in spaces.items():
                ends = [nets[0], nets[-1], *([] if shape is None else [shape])]
                trained = Sandwich(supernets[name], nets, relations, *options)
                before = Sandwich(start, nets, relations, *options).judged(ends, batches, run.device)
                after = trained.judged(ends, batches, run.device)
                out[name] = {
                    "all": trained.judged(nets, batches, run.device),
                    "before": before,
                    "after": after,
                }
            return out

        uses = {
            **shared_uses(config, run, teacher),
            "spaces": config.spaces,
            "search": [search.batches, search.batch_size],
            "compare": config.compare,
            "seed": run.seed,
        }
        made = run.stage("search", make, uses)
        tokens = run.data(config.text).task.context
        whole_cost = whole.multiply_adds(whole.itself, tokens)
        found = [
            Found(name, net, distance, whole.multiply_adds(net, tokens) / whole_cost)
            for name, nets in spaces.items()
            for net, distance in zip(nets, made[name]["all"])
        ]
        sizes = [whole.parameter_count(f.net) for f in found]
        figures = {"spearman_size": rank_correlation([f.distance for f in found], sizes)}
        first = next(iter(spaces))
        for at, end in enumerate(("smallest", "largest", *([] if shape is None else ["compared"]))):
            figures[f"distance_{end}"] = made[first]["after"][at]
            if made[first]["before"][at] > 0:
                figures[f"distance_{end}_kept"] = made[first]["after"][at] / made[first]["before"][at]
        run.record["distances"] = {name: dict(zip(map(str, spaces[name]), made[name]["all"])) for name in spaces}
        return found, figures

    @staticmethod
    def ranked(
        config: Config,
        rank: RankSpec,
        run: Run,
        found: list[Found],
        supernets: Mapping[str, SuperNet],
        teacher: nn.Module,
    ) -> list[tuple[Found, float]]:
        """Some sub-networks with their accuracy on validation data after the same fine-tuning."""
        whole = whole_of(teacher)
        ordered = sorted(found, key=lambda f: (f.cost, f.net))
        out = []
        for at in spread(len(ordered), rank.candidates):
            candidate = ordered[at]
            network = cut_out(with_encoder(teacher, supernets[candidate.space]), whole, candidate.net)

            def make(network: nn.Module = network) -> dict[str, float]:
                tuned(run, "rank", network, config.data, rank.train)
                check = run.validation(config.data)
                if check is None:
                    raise UserError("rank: sub-networks are compared on held-out data; set data.val above 0.")
                network.to(run.device)
                return {"accuracy": run.figures(network, config.data, check, run.device)["accuracy"]}

            uses = {"network": network, "data": run.data(config.data), "train": rank.train, "seed": run.seed}
            out.append((candidate, run.stage("rank", make, uses)["accuracy"]))
        run.record["ranked"] = [{"shape": str(f.net), "distance": f.distance, "accuracy": a} for f, a in out]
        return out


def choice(search: SearchSpec, found: list[Found], ranked: list[tuple[Found, float]], seed: int) -> Found:
    """The sub-network that the search takes.

    Raises:
        UserError: none is cheap enough; the message says what the cheapest costs.
    """

    def affordable(candidates: list[Found]) -> list[Found]:
        cheap = [f for f in candidates if f.cost <= search.max_cost]
        if not cheap:
            least = min(candidates, key=lambda f: f.cost)
            raise UserError(
                f"search.max_cost {search.max_cost:g}: no sub-network is as cheap; the cheapest ({least.net}) costs "
                f"{least.cost:.3g} of the teacher."
            )
        return cheap

    cheap = affordable(found)
    if search.choose == "proxy":
        right = {f: accuracy for f, accuracy in ranked}
        return max(affordable(list(right)), key=lambda f: right[f])
    if search.choose in ("largest", "smallest"):
        order = sorted(cheap, key=lambda f: (f.cost, f.net))
        return order[-1 if search.choose == "largest" else 0]
    best = min(cheap, key=lambda f: f.distance)
    if search.choose == "relation":
        return best
    near = [f for f in cheap if f != best and abs(f.cost - best.cost) <= 0.1 * best.cost]
    return random.Random(seed).choice(near) if near else best


def shared_uses(config: Config, run: Run, teacher: nn.Module) -> dict[str, Any]:
    """What the shared weights of every space depend on."""
    return {
        "teacher": FrozenTeacher(teacher),
        "data": run.data(config.text),
        "relation": config.relation,
        "between": config.between,
        "train": config.train,
    }


def with_encoder(model: nn.Module, supernet: SuperNet) -> nn.Module:
    """A copy of a whole network whose encoder has the shared weights."""
    out: Any = copy.deepcopy(model)
    out.base_model.load_state_dict(supernet.encoder.state_dict())
    return out.requires_grad_(True)


def tuned(run: Run, stage: str, network: nn.Module, data: DataSpec, train: TrainSpec) -> float:
    """Fine-tune a network in place, as its task trains a network alone; the seconds."""
    task = run.data(data).task
    module = Distillation(network, None, [objective_from_spec(o) for o in task.supervised], seed=run.seed, task=task)
    loader = run.loader(data, "train", train.batch_size, train=True)
    fitted = run.fit(stage, module, loader, train, evaluate=run.validating(data))
    module.close()
    return fitted.seconds


def steps(run: Run, data: DataSpec, train: TrainSpec) -> int:
    """Batches of a training."""
    return train.epochs * len(run.loader(data, "train", train.batch_size, train=True))


@dataclass
class SubNetStudent(Student):
    """A sub-network with its head, as a network of its own.

    Attributes:
        net: its shape.
        whole: the dimensions of the network that it was cut from, which tell the width of a head.
    """

    kind: ClassVar[str] = "stillhouse.methods.language.autodistil:SubNetStudent"
    net: SubNet = field(default_factory=lambda: SubNet(1, 1, 1, 1.0))
    whole: Whole = field(default_factory=lambda: Whole(1, 1, 1, 1, 1, 1, 1))

    def extras(self) -> dict[str, Any]:
        return {"sub_network": vars(self.net), "cut_from": vars(self.whole)}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> SubNetStudent:
        import transformers

        assert isinstance(task, Tokens)
        net, whole = SubNet(**meta["sub_network"]), Whole(**meta["cut_from"])
        config = transformers.AutoConfig.from_pretrained(folder / MODEL)
        config.num_attention_heads = 1  # which divides any hidden size
        module = shaped(getattr(transformers, AUTO[task.kind]).from_config(config), whole, net)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, net=net, whole=whole)


evaluates(SubNetStudent.kind)(evaluate)
