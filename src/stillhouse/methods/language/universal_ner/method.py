"""UniversalNER: a large model annotates a broad corpus with entities of any type; a small one learns to answer for each
type.

paper: UniversalNER: Targeted Distillation from Large Language Models for Open Named Entity Recognition
venue: ICLR 2024
arxiv: 2308.03279
task: causal language models, open named entity recognition
family: generated data
use when: one narrow ability of a large chat model is wanted in a small one, and text for it is at hand
needs: passages; an annotator (a function, or a server); a causal language model

Each passage's annotation becomes a conversation: the text, then one question for each type (`What describes river in
the text?`), answered by a JSON list. Types that the passage lacks are asked too and answered by `[]`; they are drawn in
proportion to how often a type occurs in the whole annotated corpus (`negatives.draw: frequency`), which teaches the
student to abstain. Only answers are learned; questions come in another order each epoch. The student is asked greedily,
one question at a time. `f1`, `precision` and `recall` are those of the released scorer over all questions of the test
conversations, `f1_robust` those of a reader that forgives broken lists; `abstention` is the share of questions without
an answer that were answered by an empty list, and `teacher_f1` what the annotator itself gets.

The released code lacks the step that draws negatives: their number is ours [R], as many as there are types in the
passage, from 1 to 8. Its training and inference texts differ in a word and a blank; here both are one template, of
which `data.options.template.spaced: false` is the released form. Questions that do not fit into the context are left
out whole, where the released code cuts an answer. Without an `annotator` the data's own answers are learned: the
supervised form, in which `also` adds further data sets, each told by its name before the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from stillhouse.config.specs import Data, MethodConfig, Model, Spec, TrainSpec
from stillhouse.data import Loader
from stillhouse.data.conversations import ConversationBundle, ConversationDataset, Turns
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.methods.distillation import describe
from stillhouse.methods.language.universal_ner.annotation import (
    Annotated,
    Negatives,
    annotated,
    conversation,
    frequencies,
    negative_types,
    question,
)
from stillhouse.methods.language.universal_ner.annotators import AnnotatorSpec, annotate
from stillhouse.methods.language.universal_ner.scoring import robust, scores, strict
from stillhouse.models.language import left_padded
from stillhouse.processes import share
from stillhouse.randomness import key
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating

TEXT = re.compile(r"(?:Dataset: .*? \n )?Text: (.*)", re.DOTALL)


class NegativeSpec(Spec):
    """Questions about types that the passage lacks."""

    draw: Negatives = Field("frequency", description="none | uniform (over types) | frequency (by mentions).")
    share: float = Field(1.0, gt=0, description="As many as the passage has types, times this.")
    least: int = Field(1, ge=0, description="At least so many a passage.")
    most: int = Field(8, ge=0, description="At most.")


class FilterSpec(Spec):
    """Which annotations count."""

    type_words: int = Field(5, ge=1, description="Words of a type, at most.")
    inside: bool = Field(True, description="Leave out entities that the passage does not hold.")


class AskSpec(Spec):
    """How the student is judged."""

    max_new_tokens: int = Field(256, ge=1, description="Of an answer.")
    batch_size: int = Field(64, ge=1, description="Questions at once.")
    questions: int | None = Field(None, ge=1, description="Ask the first so many test questions; null: all.")
    teacher: bool = Field(True, description="Judge the annotator too, which is asked for the test passages.")


class Config(MethodConfig):
    data: Data = Field(description="conversations:…; the passages to learn from, and test conversations with answers.")
    annotator: AnnotatorSpec | None = Field(None, description="null: learn the answers that the data has.")
    filter: FilterSpec = Field(default_factory=FilterSpec)
    negatives: NegativeSpec = Field(default_factory=NegativeSpec)
    also: dict[str, Data] = Field(
        default_factory=dict,
        description="Further conversations with answers, by the name that stands before their text.",
    )
    student: Model = Field(description="A causal language model of transformers.")
    train: TrainSpec | None = Field(default_factory=TrainSpec, description="null: the student as it comes.")
    ask: AskSpec = Field(default_factory=AskSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _conversations(self) -> Config:
        for where, spec in (("data", self.data), *((f"also.{k}", v) for k, v in self.also.items())):
            if not spec.name.startswith("conversations:"):
                raise ValueError(f"{where}.name must be conversations:PATH, not '{spec.name}'")
        return self


class UniversalNER(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = conversations_of(run, config)
        check_groups(bundle.task, config.evaluate)
        stages = []
        count = len(bundle.splits["train"])
        if config.annotator is not None:
            who = config.annotator.call or f"{config.annotator.model} at {config.annotator.server}"
            stages.append(Stage("annotate", f"{who} annotates {count:,} passages (stored, shared)"))
            stages.append(Stage("build", "make conversations of the annotations"))
        if config.train is not None:
            steps = config.train.epochs * max(count // config.train.batch_size, 1)
            student = {"student": describe(config.student.model, run.model(config.student, config.data))}
            stages.append(Stage("student", f"train the student on {count:,} conversations", student, steps=steps))
        asked = len(questions_of(bundle.splits["test"], config.ask.questions))
        return [*stages, Stage("ask", f"ask it {asked:,} questions about unseen passages")]

    def run(self, config: Config, run: Run) -> Student:
        bundle, figures = conversations_of(run, config), {}
        learned = bundle.splits["train"]
        if config.annotator is not None:
            learned, facts = self.built(config, config.annotator, run, bundle)
            run.record["annotations"] = facts
        for name, spec in config.also.items():
            other = run.data(spec)
            learned = learned + [tagged(turns, name) for turns in other.splits["train"]]
        student = run.model(config.student, config.data).to(run.device)
        if config.train is not None:
            rows, lost = bundle.encoded(learned)
            run.record["conversations"] = {"count": len(rows), "example": learned[0]}
            figures["questions_left_out"] = float(lost)
            if not rows:
                raise UserError("universal_ner: no conversation is left to learn; see the counts in environment.json.")
            options = bundle.options
            dataset = ConversationDataset(rows, bundle.task.tokenizer, options.context, options.shuffle)
            loader = Loader(dataset, config.train.batch_size, seed=run.seed, shuffle=True, drop_last=True, **share())
            objectives = [objective_from_spec(o) for o in bundle.task.supervised]
            module = Distillation(student, None, objectives, seed=run.seed, task=bundle.task)
            fitted = run.fit("student", module, loader, config.train, evaluate=run.validating(config.data))
            module.close()
            figures["train_seconds"] = fitted.seconds
        figures |= self.judged(config, run, bundle, student)
        return run.student(student, config.student, config.data, figures)

    @staticmethod
    def built(
        config: Config, annotator: AnnotatorSpec, run: Run, bundle: ConversationBundle
    ) -> tuple[list[Turns], dict[str, Any]]:
        """Conversations made of the annotator's answers about the training passages, and what was left out."""
        passages = [passage_of(turns) for turns in bundle.splits["train"]]
        answers = answers_about(run, annotator, passages)

        def make() -> dict[str, Any]:
            found, lost = annotated(passages, answers, config.filter.type_words, config.filter.inside)
            made = conversations(found, config.negatives, run.seed)
            counts = frequencies(found)
            facts = {"passages": len(found), "types": len(counts), "mentions": sum(counts.values()), **lost,
                     "most_frequent": dict(list(counts.items())[:20])}  # fmt: skip
            return {"conversations": made, "facts": facts}

        uses = {"passages": passages, "answers": answers, "filter": config.filter, "negatives": config.negatives,
                "seed": run.seed}  # fmt: skip
        result = run.stage("build", make, uses, shared=False)
        return [[(said, answer) for said, answer in turns] for turns in result["conversations"]], result["facts"]

    @staticmethod
    def judged(config: Config, run: Run, bundle: ConversationBundle, student: nn.Module) -> dict[str, float]:
        """Figures of the student's answers to the test questions, and of the annotator's."""
        wanted = questions_of(bundle.splits["test"], config.ask.questions)
        golds = [gold for _, _, gold in wanted]

        def make() -> list[str]:
            rows = [bundle.asked([opening], asked) for opening, asked, _ in wanted]
            return answered(student, bundle, rows, config.ask)

        found = run.stage("ask", make, {"student": student, "golds": golds, "ask": config.ask, "data": bundle},
                          shared=False)  # fmt: skip
        figures = scores(found, golds)
        loose = scores(found, golds, robust)
        figures |= {"f1_robust": loose["f1"], "precision_robust": loose["precision"], "recall_robust": loose["recall"]}
        nothing = ["[" in text and not robust(text) for text, gold in zip(found, golds) if not strict(gold)]
        if nothing:
            figures["abstention"] = sum(nothing) / len(nothing)
        run.record["answers"] = [
            {"question": asked, "answer": text, "gold": gold}
            for (_, asked, gold), text in list(zip(wanted, found))[:20]
        ]
        if config.annotator is not None and config.ask.teacher:
            tests = bundle.splits["test"]
            passages = [passage_of(turns) for turns in tests]
            made, _ = annotated(passages, answers_about(run, config.annotator, passages), config.filter.type_words,
                                config.filter.inside)  # fmt: skip
            known = {one.passage: one.mentions for one in made}
            theirs = [teacher_answer(known.get(passage_of([opening])), asked) for opening, asked, _ in wanted]
            figures |= {f"teacher_{name}": value for name, value in scores(theirs, golds).items()}
            figures["f1_over_teacher"] = figures["f1"] - figures["teacher_f1"]
        return figures


def conversations_of(run: Run, config: Config) -> ConversationBundle:
    bundle = run.data(config.data)
    if not isinstance(bundle, ConversationBundle):
        raise UserError(f"method universal_ner needs conversations; data.name is '{config.data.name}'.")
    return bundle


def answers_about(run: Run, spec: AnnotatorSpec, passages: Sequence[str]) -> list[str | None]:
    """The annotator's answers, as a stage that every recipe with the same annotator and passages shares."""

    def make() -> list[str | None]:
        return annotate(passages, spec.annotator(), run.folder / "answers.jsonl", spec.workers if spec.server else 1)

    found: list[str | None] = run.stage("annotate", make, {"annotator": spec.uses(), "passages": list(passages)})
    return found


def conversations(found: Sequence[Annotated], spec: NegativeSpec, seed: int) -> list[Turns]:
    """A conversation for each annotated passage, with its negative questions; of none without a question."""
    counts, out = frequencies(found), []
    for number, one in enumerate(found):
        wanted = min(max(round(spec.share * len(one.mentions)), spec.least), spec.most)
        draw = np.random.default_rng(key(seed, "negatives", number))
        answers: dict[str, Sequence[str]] = {one.shown[kind]: mentions for kind, mentions in one.mentions.items()}
        answers |= {kind: () for kind in negative_types(list(one.mentions), counts, spec.draw, wanted, draw)}
        if answers:
            out.append(conversation(one.passage, answers))
    return out


def passage_of(turns: Turns) -> str:
    """The passage of a conversation's first turn."""
    found = TEXT.fullmatch(turns[0][0])
    return found[1] if found else turns[0][0]


def tagged(turns: Turns, name: str) -> Turns:
    """A conversation with the name of its data set before the text."""
    return [*conversation(passage_of(turns), {}, name), *turns[1:]]


def questions_of(tests: Sequence[Turns], limit: int | None) -> list[tuple[tuple[str, str], str, str]]:
    """(first turn, question, right answer) of every question of the test conversations."""
    return [(turns[0], asked, gold) for turns in tests for asked, gold in turns[1:]][:limit]


def teacher_answer(mentions: Mapping[str, Sequence[str]] | None, asked: str) -> str:
    """What an annotation answers to a question."""
    kinds = {question(kind).lower(): found for kind, found in (mentions or {}).items()}
    return conversation("", {"": kinds.get(asked.lower(), ())})[1][1]


@torch.no_grad()
def answered(student: Any, bundle: ConversationBundle, rows: Sequence[Sequence[int]], how: AskSpec) -> list[str]:
    """What the model writes after each row of ids, greedily, up to the end mark.

    Raises:
        UserError: a row that the context does not hold.
    """
    tokens, end = bundle.task.tokenizer, bundle.end
    longest = max(map(len, rows), default=0)
    if longest >= bundle.task.context:
        raise UserError(
            f"A test question has {longest} tokens with its passage, but data.options.context is "
            f"{bundle.task.context}; raise it."
        )
    special, device = tokens.convert_tokens_to_ids(end), next(student.parameters()).device
    stops = [i for i in {tokens.eos_token_id, special} if i is not None and i != tokens.unk_token_id]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like length together
    out = [""] * len(rows)
    with evaluating(student):
        for start in range(0, len(order), how.batch_size):
            chosen = order[start : start + how.batch_size]
            x = left_padded([rows[i] for i in chosen], tokens.pad_token_id, device)
            room = min(how.max_new_tokens, bundle.task.context - x["input_ids"].shape[1])
            written = student.generate(**x, max_new_tokens=room, do_sample=False, eos_token_id=stops,
                                       pad_token_id=tokens.pad_token_id)  # fmt: skip
            texts = tokens.batch_decode(written[:, x["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts):
                out[i] = text.partition(end)[0].strip()
    return out
