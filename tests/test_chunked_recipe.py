"""Losses in chunks from a recipe: the terms and weights of all logits at once, without a tensor of them; and teachers
known by their top k."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillhouse import Progress, catalog
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.gkd import GKD
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.run import Run
from stillhouse.signals import Signals, TopK
from stillhouse.tasks.tokens import Tokens

pytest.importorskip("transformers", reason="transformers is not installed")
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ALL = [
    {"name": "gkd", "beta": 0.5},
    {"name": "taid", "label": "taid"},
    {"name": "seq_kd", "weight": 0.5},
    {"name": "ce", "weight": 0.5},
]
STEPS = Progress(steps_per_epoch=4, epochs=1)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A padded matrix each, of different heights; prompts that do not count; rows of different lengths."""
    lines = [{"prompt": f"say {'x' * (i % 5)}: ", "completion": "abc" * (1 + i % 7)} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "data": {"name": f"text:{tmp_path / 'pairs.jsonl'}", "options": {"tokenizer": "bytes", "context": 40}},
        "teacher": {
            "model": "hf:config:gpt2",
            "options": {**GPT2, "n_embd": 24, "vocab_size": 300},
            "train": {"epochs": 1, "batch_size": 4},
        },
        "student": {"model": "hf:config:gpt2", "options": {**GPT2, "vocab_size": 320}},
        "objectives": ALL,
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": ["accuracy"],
    }


def trained(spec: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The rows of metrics.csv and the student's weights after a run."""
    from safetensors.torch import load_file

    execute(recipe.validate({**spec, **changes}), folder, cpu=True)
    with (folder / "metrics.csv").open() as handle:
        rows = [
            {k: float(v) for k, v in r.items() if k.split(".")[0] in ("loss", "gkd", "taid", "seq_kd", "ce") and v}
            for r in csv.DictReader(handle)
        ]
    return [r for r in rows if r], load_file(folder / "product" / "model" / "model.safetensors")


def built(spec: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """The distillation of a recipe, built, and a batch."""
    config = recipe.validate({**spec, **changes})
    method, run = catalog.method(config.method), Run(None, config, cpu=True)
    student = run.model(config.student, config.data)
    teachers = {"teacher": run.model(config.teacher.network, config.data, "teacher", 0)}
    batch = next(iter(run.loader(config.data, "train", 4)))
    return method.module(config, run, student, teachers).build(batch), batch


class Largest(TorchDispatchMode):
    """Notes the most numbers in a tensor whose last dimension is a vocabulary, padded or not, in a forward or backward
    pass."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths, self.rows = widths, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] in self.widths:
                self.rows = max(self.rows, x.numel() // x.shape[-1])
        return out


def test_a_run_in_chunks_has_the_terms_and_the_weights_of_a_run_on_all_logits(spec, tmp_path: Path):
    (plain, weights), (chunked, found) = (trained(spec, tmp_path / str(how), chunked=how) for how in (False, True))
    assert len(plain) >= 4 and {"loss", "gkd", "taid", "seq_kd", "ce"} <= set(plain[0])
    for mine, theirs in zip(chunked, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_step_in_chunks_makes_no_tensor_of_all_tokens_and_the_vocabulary(spec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stillhouse.functional.heads.CHUNK", 1)  # the least: 16 tokens a chunk
    rows = {}
    for how in (False, True):
        module, batch = built(spec, chunked=how)
        with Largest(300, 320, module.task.vocabulary) as largest:
            module(batch, STEPS)["loss"].backward()
        rows[how] = largest.rows
    assert (
        rows[False] == batch["label"].numel() > 2 * 24 and rows[True] <= 24
    )  # which is the width of the teacher's matrix, transposed


def test_a_vocabulary_is_chunked_by_itself_only_where_it_is_big_and_everything_can(
    spec, monkeypatch: pytest.MonkeyPatch
):
    assert not built(spec)[0]._reader.task.without_head
    monkeypatch.setattr("stillhouse.functional.heads.BIG_VOCABULARY", 200)
    for objectives, expected in (
        (ALL, True),
        ([{"name": "kd"}], False),
        ([{"name": "ce", "label_smoothing": 0.1}], False),
    ):
        assert built(spec, objectives=objectives)[0]._reader.task.without_head is expected, objectives


def test_a_student_is_judged_in_chunks_as_on_all_logits(spec, monkeypatch: pytest.MonkeyPatch):
    module, batch = built(spec)
    judged, rows = [], []
    for big in (10**9, 200):
        monkeypatch.setattr("stillhouse.functional.heads.BIG_VOCABULARY", big)
        monkeypatch.setattr("stillhouse.functional.heads.CHUNK", 1)
        with Largest(320, module.task.vocabulary) as largest:
            judged.append(judge(module.task, module.student, [batch, batch]))
        rows.append(largest.rows)
    assert judged[1] == pytest.approx(judged[0], rel=1e-6)
    assert rows[0] >= batch["label"].numel() > 16 >= rows[1]


def test_a_compiled_step_in_chunks_runs_the_compiled_bodies_of_both_networks(spec):
    torch._dynamo.reset()
    (eager, batch), (compiled, _) = built(spec, chunked=True), built(spec, chunked=True)
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        ran.append("graph")
        return graph.forward

    compiled.compile(backend=backend)
    expected, given = eager(batch, STEPS), compiled(batch, STEPS)
    assert len(ran) >= 2
    torch.testing.assert_close(given["loss"], expected["loss"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"objectives": ["kd"]},
            "the objective 'kd' reads logits, not hidden states as gkd, taid, seq_kd, and ce without label smoothing "
            "can",
        ),
        ({"objectives": [{"name": "ce", "label_smoothing": 0.1}]}, "the objective 'ce' reads logits"),
        (
            {
                "student": {
                    "model": "hf:config:granite",
                    "options": {
                        "hidden_size": 16,
                        "intermediate_size": 16,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 2,
                        "logits_scaling": 4.0,
                    },
                }
            },
            "of the student, a GraniteForCausalLM changes its logits after the output layer",
        ),
    ],
)
def test_what_cannot_be_chunked_says_why(spec, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        built(spec, chunked=True, **changes)


def test_a_teacher_that_numbers_its_tokens_otherwise_teaches_in_chunks_as_it_does_at_once():
    import transformers

    from stillhouse.distillation.distillation import Distillation
    from stillhouse.functional.vocabularies import TokenMap
    from stillhouse.models.language import OtherIds

    def net(seed: int, size: int) -> Any:
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=size, bos_token_id=0, eos_token_id=0, **GPT2)
        )

    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    batch, terms = {"input": {"input_ids": ids}, "label": ids.roll(-1, 1), "index": torch.arange(3)}, {}
    for how in (False, True):
        teacher = OtherIds(
            net(1, 50), TokenMap(torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20], False)
        )
        module = Distillation(net(0, 20), teacher, ["gkd"], task=Tokens("causal", 20), chunked=how).build(batch)
        terms[how] = module(batch, STEPS)["gkd"]
    torch.testing.assert_close(terms[True], terms[False], rtol=1e-5, atol=1e-6)


# ---- teachers that are known by their top k --------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_store_of_the_top_k_teaches_gkd_and_without_chunks_taid(spec, tmp_path: Path, chunked: bool):
    store = {**spec["teacher"], "store": {"top": 8, "shard_rows": 10}}
    rows, _ = trained(spec, tmp_path / "gkd", teacher=store, objectives=["gkd"], chunked=chunked)
    assert all(math.isfinite(r["gkd"]) for r in rows)
    if chunked:
        with pytest.raises(UserError, match="'taid' reads the student's logits where a teacher gives its top k"):
            trained(spec, tmp_path / "taid", teacher=store, objectives=["taid"], chunked=True)
    else:
        rows, _ = trained(spec, tmp_path / "taid", teacher=store, objectives=["taid"], chunked=False)
        assert all(math.isfinite(r["taid"]) for r in rows)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_row_that_names_fewer_than_k_counts_what_it_names_and_one_that_names_none_not_at_all(beta: float):
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 7).log_softmax(-1), torch.randn(3, 7, requires_grad=True)
    values, indices = teacher.topk(3)
    values[1, 2], indices[1, 2] = -math.inf, indices[1, 0]
    values[2], indices[2] = -math.inf, 0
    top = TopK(values, indices, 1 - values.exp().sum(-1))
    loss = GKD(beta)(Signals(logits=student), Signals(top=top), {}, STEPS)["loss"]
    loss.backward()
    alone = [
        GKD(beta)(
            Signals(logits=student[r : r + 1]),
            Signals(top=TopK(values[r : r + 1, :k], indices[r : r + 1, :k], top.tail[r : r + 1])),
            {},
            STEPS,
        )["loss"]
        for r, k in ((0, 3), (1, 2))
    ]
    torch.testing.assert_close(loss, (alone[0] + alone[1]) / 2)
    assert torch.isfinite(student.grad).all() and not student.grad[2].any()


# ---- which labels count ----------------------------------------------------------------------------------------------


def test_cross_entropy_counts_the_mask_and_divides_by_the_tokens_of_the_whole_step():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    label[0, 0], mask = -100, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    rows = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none", ignore_index=-100)
    expected = (rows * mask.flatten()).sum()
    batch = {"label": label, "mask": mask}
    for signals in (Signals(logits=logits), Signals(parts={"hidden": logits, "output_weight": torch.eye(9)})):
        torch.testing.assert_close(CrossEntropy()(signals, Signals(), batch, STEPS)["loss"], expected / 4)
        torch.testing.assert_close(
            CrossEntropy()(signals, Signals(), {**batch, "token_count": 10}, STEPS)["loss"], expected / 10
        )
