"""LLaVA-MoD: a small model that writes about images is distilled dense to dense, then into experts, then by preference.

paper: LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation
venue: ICLR 2025
arxiv: 2408.15881
task: visual text
family: mixture of experts, preference
use when: a language model with eyes must be small, and a large one of the same tokenizer is there to imitate
needs: images with questions and answers; a CLIP, whose image tower both models look through

Four stages. Adaptor: cross-entropy on captions, the projector alone. Dense to dense: the student's probabilities of
each token of an answer follow the teacher's (forward KL up to the teacher's entropy), alone. Dense to sparse: every
second MLP becomes four copies, two of which a router chooses for each token; the same loss with cross-entropy, and one
that balances the experts' load; MLPs, routers and projector are trained. Preference: the summed log-probabilities of a
right and of a wrong answer are compared with those of the teacher, which is the reference (KTO in pairs, or DPO).
In the released code the mask is one place off (`shift: false`): the first token of an answer is never distilled; the
balance counts twice, 0.02 for the paper's 0.01, which is the default here; and its gate draws the second expert with
noise even in evaluation. Here a network is evaluated without noise and without limits of capacity, so that an answer
depends on no other. Captions of the first stage are those of `captions`, for both models. The large model is trained as
LLaVA is, projector first. The questions of the recipe are written from class labels: what its networks learn is class
names, not language. A share of the student's is wrong (`label_noise`), the teacher saw right ones.
Figures: `exact` answers; `invented`, of things that are not there the share said to be there; `caption_hallucination`,
of things named in captions that the network writes the share that is not in the image; `preference_accuracy` and
`margin_over_teacher`, in nats, of right over wrong answers; `expert_balance` and `dropped_routes` of a training batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import (
    Data,
    DataSpec,
    MethodConfig,
    Model,
    ModelSpec,
    Spec,
    Teacher,
    TeacherSpec,
    TrainSpec,
)
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED, counted_mean, step_count
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import cross_entropy_rows
from stillhouse.methods.distillation import describe
from stillhouse.models import build
from stillhouse.models.visual_language import VisualLanguage
from stillhouse.nn.experts import mixtures, upcycled
from stillhouse.randomness import keyed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating, log_softmax, to_device
from stillhouse.tasks.image_text import ImageText
from stillhouse.tasks.visual_text import CAPTION, PROMPTS, VisualText
from stillhouse.training.module import TrainingModule

MimicLoss = Literal["only_kd", "kd_lm", "lm"]
WRITTEN = 512  # test images about which captions are written


# ---- mathematics -----------------------------------------------------------------------------------------------------


def distilled_places(label: Tensor, shift: bool = True, everything: bool = False) -> Tensor:
    """(B, L) which predictions are distilled, of labels (B, L) that stand where their predictions stand.

    Args:
        shift: those that predict a token of the answer; false: those at the answer's own tokens, one place later.
        everything: all, padding included.
    """
    counts = torch.ones_like(label, dtype=torch.bool) if everything else label != IGNORED
    return counts if shift or everything else F.pad(counts[:, :-1], (1, 0))


def mimic_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """(...,) -sum_v p_T log p_S of logits (..., V) and (..., V'), over the tokens that both have, in float32."""
    common = min(student.shape[-1], teacher.shape[-1])
    return cross_entropy_rows(student[..., :common], log_softmax(teacher[..., :common].detach().float()))


def mimic_loss(student: Tensor, teacher: Tensor, counts: Tensor, count: Tensor | None = None) -> Tensor:
    """The mean of `mimic_rows` over the places (...,) that count; 0 where none does."""
    return counted_mean(mimic_rows(student, teacher), counts, count)


@full_precision
def answer_log_probs(logits: Tensor, label: Tensor) -> Tensor:
    """(B,) the summed log-probabilities of answers, of logits (B, L, V) and labels (B, L) that stand where their
    predictions stand."""
    rows = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=IGNORED, reduction="none")
    return -rows.view_as(label).sum(1)


@full_precision
def preference_loss(
    right: Tensor,
    wrong: Tensor,
    their_right: Tensor,
    their_wrong: Tensor,
    loss: str = "kto_pair",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """How little the student prefers right answers to wrong ones, compared with the reference.

    Args:
        right, wrong: (B,) the student's log-probabilities of answers.
        their_right, their_wrong: (B,) the reference's.
        loss: kto_pair: 1 - sigmoid of each gain over the other answers' mean gain; dpo: log-sigmoid of the difference.
        beta: scales gains.
        label_smoothing: of dpo, the share of pairs taken to be the wrong way round.
    """
    gain, other = right - their_right.detach(), wrong - their_wrong.detach()
    if loss == "dpo":
        margin = beta * (gain - other)
        return (-(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)).mean()
    mean, their_mean = gain.mean().clamp_min(0), other.mean().clamp_min(0)
    good, bad = 1 - (beta * (gain - their_mean)).sigmoid(), 1 - (beta * (mean - other)).sigmoid()
    return torch.cat([good, bad]).mean()


def balance_loss(network: nn.Module, like: Tensor) -> Tensor:
    """The sum over all mixtures of the loss that balances their load in the last forward pass; 0 without mixtures."""
    found = [m.balance for m in mixtures(network) if m.balance is not None]
    return torch.stack(found).sum() if found else like.new_zeros(())


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Large(ModelSpec):
    """The large model, which teaches."""

    data: DataSpec | None = Field(None, description="What it is trained on; default: the recipe's data.")
    align: TrainSpec = Field(default_factory=TrainSpec, description="How its projector is trained first.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is trained.")


class Mimic(Spec):
    """Imitation of the teacher."""

    loss: MimicLoss = Field("only_kd", description="The teacher's probabilities, with labels (kd_lm), or labels (lm).")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is trained.")


class SparseMimic(Mimic):
    """Imitation by a mixture of experts."""

    loss: MimicLoss = Field("kd_lm", description="The teacher's probabilities, with labels (kd_lm), or labels (lm).")
    experts: int = Field(4, ge=0, description="Copies of each MLP that becomes a mixture; 0: none, a dense student.")
    mode: str = Field(
        "sparse", description="Which layers: sparse (every second), first_half, second_half, dense (all)."
    )
    factor: float = Field(1.5, gt=0, description="Of the experts' capacity in training.")
    least: int = Field(0, ge=0, description="The smallest capacity.")
    noisy: bool = Field(True, description="Whether the second expert is drawn with noise in training.")
    balance: float = Field(0.01, ge=0, description="Weight of the loss that balances the load, summed over mixtures.")
    trains: Literal["mlp", "mlp_and_projector", "all"] = Field(
        "mlp_and_projector", description="mlp: MLPs and routers alone, as in the released code."
    )


class Preference(Spec):
    """Preference distillation."""

    loss: Literal["kto_pair", "dpo"] = "kto_pair"
    beta: float = Field(0.1, gt=0, description="Scales the gains over the teacher.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Of dpo.")
    data: DataSpec | None = Field(None, description="Pairs of right and wrong answers; default: the teacher's data.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is trained.")


class Config(MethodConfig):
    data: Data
    tower: Teacher = Field(description="A CLIP, whose image tower all models look through.")
    teacher: Large
    student: Model = Field(description="stillhouse:visual_language, dense.")
    captions: DataSpec | None = Field(
        None, description="What both projectors are trained on first; default: the data of each."
    )
    align: TrainSpec = Field(default_factory=TrainSpec, description="How the student's projector is trained first.")
    dense: Mimic | None = Field(default_factory=Mimic, description="Dense to dense; null: left out.")
    sparse: SparseMimic | None = Field(default_factory=SparseMimic, description="Dense to sparse; null: left out.")
    preference: Preference | None = Field(default_factory=Preference, description="null: left out.")
    shift: bool = Field(True, description="False: the released code's mask, one place off.")
    all_tokens: bool = Field(False, description="Distil prompts and padding too.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


TOWER = Stage("teacher", "train the CLIP whose image tower is used (stored, shared)")
LARGE = Stage("large", "train the large model: its projector, then all but the tower (stored, shared)")
ADAPTOR = Stage("adaptor", "train the student's projector on answers (stored)")
DENSE = Stage("dense", "distil dense to dense (stored)")
SPARSE = Stage("sparse", "turn MLPs into experts, and distil into them (stored)")
PREFERENCE = Stage("preference", "prefer right answers more than the teacher does")


# ---- what is trained -------------------------------------------------------------------------------------------------


class AnswerTraining(TrainingModule):
    """A model that learns answers from labels, from a teacher, or from both.

    Args:
        student: with the parameters that learn marked so.
        teacher: frozen, with the student's tower; None: none.
        task: reads logits.
        loss: which terms.
        balance: weight of the experts' balance.
        shift, all_tokens: which places are distilled.
    """

    def __init__(
        self,
        student: VisualLanguage,
        teacher: VisualLanguage | None,
        task: VisualText,
        loss: MimicLoss = "lm",
        balance: float = 0.0,
        shift: bool = True,
        all_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.student: VisualLanguage = student
        self.task, self.loss, self.balance, self.shift, self.all_tokens = task, loss, balance, shift, all_tokens
        self._teacher = None if teacher is None or loss == "lm" else (teacher.eval().requires_grad_(False),)

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device."""
        if self._teacher is not None:
            self._teacher[0].to(next(self.student.parameters()).device)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`; `mimic` and `ce`, means over tokens; and of experts `balance` and `dropped`."""
        inputs, label = batch["input"], batch["label"]
        patches = self.student.patches(inputs["pixel_values"])
        logits = self.task.read(self.student(**inputs, patches=patches), batch).require("logits")
        terms: dict[str, Tensor] = {}
        if self._teacher is not None:
            with torch.no_grad():
                theirs = self.task.read(self._teacher[0](**inputs, patches=patches), batch).require("logits")
            counts = distilled_places(label, self.shift, self.all_tokens)
            terms["mimic"] = mimic_loss(logits, theirs, counts, step_count(batch, label, counts, share=self.training))
        if self.loss != "only_kd":
            counts = label != IGNORED
            rows = F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), ignore_index=IGNORED, reduction="sum")
            terms["ce"] = rows / step_count(batch, label, counts, share=self.training)
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss + self.balance * balance_loss(self.student, loss), **terms, **load(self.student)}


class PreferenceTraining(TrainingModule):
    """A model that prefers right answers to wrong ones by more than its teacher does.

    Args:
        student: with the parameters that learn marked so.
        teacher: the reference, with the student's tower.
        task: reads logits.
        options: loss and beta.
        balance: weight of the experts' balance, of both answers.
    """

    def __init__(
        self, student: VisualLanguage, teacher: VisualLanguage, task: VisualText, options: Preference, balance: float
    ) -> None:
        super().__init__()
        self.student: VisualLanguage = student
        self.task, self.options, self.balance = task, options, balance
        self._teacher = (teacher.eval().requires_grad_(False),)

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device. Raises `UserError` for data without wrong answers."""
        if "wrong" not in batch:
            raise UserError("preference needs data with a wrong answer for each question, such as questions:NAME.")
        self._teacher[0].to(next(self.student.parameters()).device)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, `preference`, the share of pairs whose right answer gains more (`prefers`), and `balance`."""
        patches = self.student.patches(batch["input"]["pixel_values"])
        right = scores(self.student, self.task, batch, patches, wrong=False)
        balance = balance_loss(self.student, right)
        wrong = scores(self.student, self.task, batch, patches, wrong=True)
        balance = balance + balance_loss(self.student, wrong)
        with torch.no_grad():
            their_right, their_wrong = (
                scores(self._teacher[0], self.task, batch, patches, wrong=side) for side in (False, True)
            )
        options = self.options
        loss = preference_loss(
            right, wrong, their_right, their_wrong, options.loss, options.beta, options.label_smoothing
        )
        prefers = (right - their_right > wrong - their_wrong).float().mean()
        return {"loss": loss + self.balance * balance, "preference": loss, "prefers": prefers}


def scores(network: VisualLanguage, task: VisualText, batch: Batch, patches: Tensor, wrong: bool) -> Tensor:
    """(B,) log-probabilities of the right, or the wrong, answers."""
    inputs, label = batch["input"], batch["label"]
    if wrong:
        inputs, label = {"pixel_values": inputs["pixel_values"], **batch["wrong"]}, batch["wrong_label"]
    return answer_log_probs(task.read(network(**inputs, patches=patches), batch).require("logits"), label)


def load(network: nn.Module) -> dict[str, Tensor]:
    """Of the last step: the balance of the experts' load (1: even), and the share of routes that were dropped."""
    found = [
        (m.balance.detach(), m.dropped) for m in mixtures(network) if m.balance is not None and m.dropped is not None
    ]
    if not found:
        return {}
    balance, dropped = zip(*found)
    return {"balance": torch.stack(balance).mean(), "dropped": torch.stack(dropped).mean()}


def train_only(network: VisualLanguage, parts: str) -> None:
    """Mark what learns: "projector"; "mlp", MLPs and routers; "mlp_and_projector"; or "all" but the tower."""
    for name, parameter in network.named_parameters():
        projector, mlp = name.startswith("projector."), ".mlp." in name
        wanted = {"projector": projector, "mlp": mlp, "mlp_and_projector": mlp or projector, "all": True}[parts]
        parameter.requires_grad_(wanted and not name.startswith("tower."))


# ---- the method ------------------------------------------------------------------------------------------------------


class LlavaMoD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, VisualText)
        check_groups(bundle.task, config.evaluate)
        with run.rehearsal():
            clip = self._clip(config, run)
        large, student = (
            self._network(config.teacher, config, run, clip),
            self._network(config.student, config, run, clip),
        )
        if any(mixtures(student)):
            raise UserError("The student of llava_mod begins dense; sparse.experts says how many experts it gets.")
        data = self._teacher_data(config)
        large_steps = self._steps(run, config.captions or data, config.teacher.align)
        large_steps += self._steps(run, data, config.teacher.train)
        stages = [
            TOWER,
            LARGE.filled(models={"teacher": describe(config.teacher.model, large)}, steps=large_steps),
            ADAPTOR.filled(
                models={"student": describe(config.student.model, student)},
                steps=self._steps(run, config.captions or config.data, config.align),
            ),
        ]
        if config.dense is not None:
            stages.append(DENSE.filled(steps=self._steps(run, config.data, config.dense.train)))
        if config.sparse is not None:
            sparse = self._network(self._sparse_spec(config), config, run, clip)
            models = {"student": describe(config.student.model, sparse)}
            stages.append(SPARSE.filled(models=models, steps=self._steps(run, config.data, config.sparse.train)))
        if config.preference is not None:
            pairs = config.preference.data or data
            stages.append(PREFERENCE.filled(steps=self._steps(run, pairs, config.preference.train)))
        return stages

    @staticmethod
    def _steps(run: Run, data: DataSpec, train: TrainSpec) -> int:
        return train.epochs * len(run.loader(data, "train", train.batch_size, train=True))

    @staticmethod
    def _teacher_data(config: Config) -> DataSpec:
        return config.teacher.data or config.data

    @staticmethod
    def _clip(config: Config, run: Run) -> Any:
        """The CLIP with its weights. Raises `UserError` for another network, or for images that are not the data's."""
        ours = run.data(config.data).task
        if config.tower.train is None:
            found = build(config.tower.network.model_copy(update={"options": {"task": "features"}}))
            side = getattr(getattr(found, "config", None), "vision_config", None)
            if side is None or not hasattr(found, "vision_model") or side.image_size != ours.size[0]:
                raise UserError(
                    f"tower: '{config.tower.model}' must be a CLIP of transformers; set data.image_size to the size of "
                    "its images."
                )
            return found
        data = config.tower.data or config.data
        if not isinstance(run.data(data).task, ImageText):
            raise UserError(
                "tower.data: the tower is that of a CLIP, which needs images with captions (captions:NAME)."
            )
        clip: Any = run.network("tower", config.tower, data)
        its = run.data(data).task
        if not hasattr(clip, "vision_model") or (its.size, its.mean, its.std) != (ours.size, ours.mean, ours.std):
            raise UserError(
                f"tower: '{config.tower.model}' on '{data.name}' must be a CLIP of transformers on images of the size "
                f"and normalisation of '{config.data.name}', {list(ours.size)} pixels."
            )
        return clip

    @staticmethod
    def _network(spec: ModelSpec, config: Config, run: Run, clip: Any, seed: int | None = None) -> VisualLanguage:
        """A model behind the CLIP's tower."""
        plain = ModelSpec.model_validate(spec.model_dump(include=set(ModelSpec.model_fields)))
        network = run.model(with_tower(plain, clip), config.data, "student" if seed is None else "teacher", seed)
        if not isinstance(network, VisualLanguage):
            raise UserError(f"llava_mod distils stillhouse:visual_language, not '{spec.model}'.")
        tower = getattr(network.tower, "vision_model", network.tower)
        tower.load_state_dict(clip.vision_model.state_dict())
        return network

    @staticmethod
    def _sparse_spec(config: Config) -> ModelSpec:
        """The spec that builds the student as it ends."""
        chosen = config.sparse
        if chosen is None or not chosen.experts:
            return config.student
        experts = {name: getattr(chosen, name) for name in ("experts", "mode", "factor", "least", "noisy")}
        return config.student.model_copy(update={"options": {**config.student.options, **experts}, "checkpoint": None})

    def run(self, config: Config, run: Run) -> Student:
        clip = self._clip(config, run)
        task: VisualText = run.data(config.data, VisualText).task
        teacher, theirs = self._large(config, run, clip)
        student = self._network(config.student, config, run, clip)
        past: dict[str, Any] = {"teacher": teacher, "student": config.student, "seed": run.seed}
        figures: dict[str, float] = {
            f"{name}_teacher": theirs[name] for name in ("exact", "invented") if name in theirs
        }

        def stage(
            name: Stage,
            options: Spec,
            make: Callable[[], AnswerTraining],
            train: TrainSpec,
            data: DataSpec = config.data,
        ) -> None:
            """Train the student as it is, or take the weights of a run that began alike."""

            def work() -> dict[str, Any]:
                loader = run.loader(data, "train", train.batch_size, train=True)
                run.fit(name, make(), loader, train, splits=run.splits(data))
                return {"weights": state_on_cpu(student), "figures": self._load(student, next(iter(loader)))}

            past[str(name)] = options
            past[f"{name} samples"] = [data, run.data(data)]
            uses = dict(past)
            made = run.stage(name, work, uses)
            student.load_state_dict(made["weights"])
            figures.update(made["figures"])

        def mimic(options: Mimic, balance: float = 0.0) -> AnswerTraining:
            return AnswerTraining(student, teacher, task, options.loss, balance, config.shift, config.all_tokens)

        train_only(student, "projector")
        first = config.captions or config.data
        stage(ADAPTOR, config.align, lambda: AnswerTraining(student, None, task), config.align, first)
        past["places"] = [config.shift, config.all_tokens]
        if config.dense is not None:
            dense = config.dense
            train_only(student, "all")
            stage(DENSE, dense, lambda: mimic(dense), dense.train)
        if config.sparse is not None:
            sparse = config.sparse
            self._upcycle(config, run, student)
            train_only(student, sparse.trains)
            stage(SPARSE, sparse, lambda: mimic(sparse, sparse.balance), sparse.train)
        if config.preference is not None:
            self._prefer(config, run, student, teacher, task)
        spec = as_it_is(with_tower(self._sparse_spec(config), clip), student)
        figures |= self._written(run, student, teacher, task)
        return run.student(student, spec, config.data, figures)

    @staticmethod
    def _upcycle(config: Config, run: Run, student: VisualLanguage) -> None:
        options = config.sparse
        if options is None or not options.experts:
            return
        device = next(student.parameters()).device
        with keyed("experts", run.seed):
            upcycled(
                student.decoder.model.layers,
                student.decoder.config.hidden_size,
                options.mode,
                experts=options.experts,
                factor=options.factor,
                least=options.least,
                noisy=options.noisy,
            )
        student.to(device)

    def _large(self, config: Config, run: Run, clip: Any) -> tuple[VisualLanguage, dict[str, float]]:
        """The large model, trained, and its figures on the test split; shared by all seeds."""
        spec, data = config.teacher, self._teacher_data(config)
        network = self._network(spec, config, run, clip, 0)
        bundle = run.data(data, VisualText)
        its: VisualText = run.data(config.data).task
        its.as_teacher(network, TeacherSpec(model=spec.model), bundle.task)

        def make() -> dict[str, Any]:
            with run.seeded(0):
                first = config.captions or data
                for part, learns, train, its_data in (
                    ("align", "projector", spec.align, first),
                    ("large", "all", spec.train, data),
                ):
                    train_only(network, learns)
                    loader = run.loader(its_data, "train", train.batch_size, train=True)
                    module = AnswerTraining(network, None, bundle.task)
                    run.fit(part, module, loader, train, splits=run.splits(its_data))
            device = next(network.parameters()).device
            figures = run.figures(network, config.data, run.loader(*run.judging_data()), device)
            return {"weights": state_on_cpu(network), "figures": figures}

        uses = {"large": spec, "data": data, "samples": bundle, "judged": run.data(config.data), "tower": clip}
        if config.captions is not None:
            uses["captions"] = [config.captions, run.data(config.captions)]
        made = run.stage(LARGE, make, uses)
        network.load_state_dict(made["weights"])
        run.record.setdefault("teachers", {})["teacher"] = {"model": spec.model, **made["figures"]}
        return network.eval().requires_grad_(False), made["figures"]

    @staticmethod
    def _load(student: VisualLanguage, batch: Batch) -> dict[str, float]:
        """Of a training batch: the balance of the experts' load, and the share of routes that are dropped."""
        if not any(True for _ in mixtures(student)):
            return {}
        with torch.no_grad(), keyed("load"):
            student.train()
            student(**to_device(batch["input"], next(student.parameters()).device))
            found = load(student)
        return {"expert_balance": float(found["balance"]), "dropped_routes": float(found["dropped"])}

    def _prefer(
        self, config: Config, run: Run, student: VisualLanguage, teacher: VisualLanguage, task: VisualText
    ) -> None:
        options, sparse = config.preference, config.sparse
        assert options is not None
        data = options.data or self._teacher_data(config)
        train_only(student, "all" if sparse is None else sparse.trains)
        module = PreferenceTraining(student, teacher, task, options, 0.0 if sparse is None else sparse.balance)
        loader = run.loader(data, "train", options.train.batch_size, train=True)
        run.fit(PREFERENCE, module, loader, options.train, splits=run.splits(data))

    @staticmethod
    @torch.no_grad()
    def _written(run: Run, student: VisualLanguage, teacher: VisualLanguage, task: VisualText) -> dict[str, float]:
        """Figures of test images: what is invented in captions that the student writes, and how much it and the teacher
        prefer right answers."""
        spec, split = run.judging_data()
        loader, device = run.loader(spec, split), next(student.parameters()).device
        teacher.to(device)
        contents = getattr(run.data(spec).dataset(split, train=False), "contents", None)
        named = wrong = seen = 0
        margins: list[Tensor] = []
        with evaluating(student):
            for batch in loader:
                batch = to_device(batch, device)
                images = batch["input"]["pixel_values"]
                patches = student.patches(images)
                if "wrong" in batch:
                    each = [
                        scores(network, task, batch, patches, False) - scores(network, task, batch, patches, True)
                        for network in (student, teacher)
                    ]
                    margins.append(torch.stack(each, 1))
                if seen < WRITTEN and CAPTION in task.kinds and contents is not None:
                    seen += len(images)
                    texts = task.write(student, images, PROMPTS[CAPTION])
                    for text, index in zip(texts, batch["index"].tolist()):
                        found = task.named(text)
                        named += len(found)
                        wrong += sum(c not in contents[index].there for c in found)
        out: dict[str, float] = {}
        if margins:
            mine, theirs = torch.cat(margins).cpu().unbind(1)
            out["preference_accuracy"] = float((mine > 0).double().mean())
            out["margin_over_teacher"] = float((mine - theirs).mean())
        return {**out, "caption_hallucination": wrong / named} if named else out


def with_tower(spec: ModelSpec, clip: Any) -> ModelSpec:
    """A spec whose model looks through the tower of a CLIP."""
    tower = clip.vision_model.config.to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    facts = {name: tower[name] for name in (*sizes, "num_channels", "hidden_act", "layer_norm_eps")}
    return spec.model_copy(update={"options": {**spec.options, "tower": facts}})


def as_it_is(spec: ModelSpec, network: VisualLanguage) -> ModelSpec:
    """A spec that builds a model without published weights: its decoder by the config that it has."""
    if "model" not in spec.options.get("decoder", {}):
        return spec
    config = network.decoder.config.to_diff_dict()
    left_out = ("architectures", "transformers_version", "dtype", "_name_or_path")
    decoder = {k: v for k, v in config.items() if k not in left_out}
    return spec.model_copy(update={"options": {**spec.options, "decoder": decoder}})
