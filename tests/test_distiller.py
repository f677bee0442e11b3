"""Distiller: the bound on mutual information keeps its promises, layers are matched right, padding counts for nothing,
both networks see one mixture, and recommendations come from other data alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional import token_features as features
from stillhouse.methods.language.distiller.augmentation import MixedDistillation, augmented
from stillhouse.methods.language.distiller.information import SequenceCritic, log_mean_of_others, mi_alpha_bound
from stillhouse.methods.language.distiller.method import AutoSpec, Pipeline, candidates_of, objectives_of, tried
from stillhouse.methods.language.distiller.objectives import TransportedStates, transport
from stillhouse.methods.language.distiller.recommender import Recommender, Trial, importance, leave_one_out
from stillhouse.models.text_layers import attention_taps, hidden_taps
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.tasks.tokens import Tokens
from stillhouse.training.context import Progress

ALPHAS = [0.0, 0.01, 0.5, 0.9, 1.0]


def gaussian_pairs(information: float, seed: int, b: int = 64, d: int = 20) -> Tensor:
    """Optimal scores log p(y_j | x_i) / p(y_j) of correlated Gaussians of so much mutual information."""
    rho = math.sqrt(1 - math.exp(-2 * information / d))
    draw = torch.Generator().manual_seed(seed)
    x, n = torch.randn(b, d, generator=draw), torch.randn(b, d, generator=draw)
    y = rho * x + math.sqrt(1 - rho**2) * n
    far = (y[None] - rho * x[:, None]).square().sum(-1) / (1 - rho**2)
    return 0.5 * (y.square().sum(-1)[None] - far) - 0.5 * d * math.log(1 - rho**2)


def test_alpha_trades_variance_for_bias() -> None:
    found = {
        alpha: torch.stack([mi_alpha_bound(gaussian_pairs(4.0, s), torch.zeros(64), alpha) for s in range(120)])
        for alpha in ALPHAS
    }
    means, spreads = [v.mean().item() for v in found.values()], [v.std().item() for v in found.values()]
    assert means == sorted(means, reverse=True) and spreads == sorted(spreads, reverse=True)
    card = {0.0: (4.04, 0.47), 0.01: (3.98, 0.38), 0.5: (3.51, 0.23), 0.9: (3.23, 0.20), 1.0: (3.07, 0.19)}
    for (mean, spread), value in zip(card.values(), means):
        assert abs(value - mean) < 4 * spread * math.sqrt(1 / 120 + 1 / 400)
    assert found[1.0].max() <= math.log(63)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_bound_knows_nothing_of_constants(alpha: float) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 6, generator=draw, dtype=torch.double)
    baseline, shift = torch.randn(2, 6, generator=draw, dtype=torch.double)
    assert mi_alpha_bound(torch.full((6, 6), 3.0), torch.full((6,), 3.0), alpha).abs() < 1e-6
    plain = mi_alpha_bound(scores, baseline, 1.0 if alpha == 1 else alpha)
    moved = mi_alpha_bound(scores + shift[:, None], baseline + shift, alpha)
    torch.testing.assert_close(plain, moved)
    huge = (80 * scores).float().requires_grad_()
    mi_alpha_bound(huge, baseline.float(), max(alpha, 0.5)).backward()
    assert huge.grad.isfinite().all()


def test_one_score_that_dominates_is_left_out_exactly() -> None:
    scores = torch.zeros(3, 3)
    scores[0, 1] = 60.0
    expected = torch.tensor([60.0 - math.log(2), 0.0, 60.0 - math.log(2)])
    torch.testing.assert_close(log_mean_of_others(scores)[0], expected)
    with pytest.raises(UserError, match="this batch holds one"):
        mi_alpha_bound(torch.zeros(1, 1), torch.zeros(1), 0.5)


def test_flows_are_the_cheapest_of_equal_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    for n, m in ((2, 3), (4, 6), (3, 3), (1, 5)):
        cost = torch.randn(n, m, generator=draw)
        flow = transport(cost)
        torch.testing.assert_close(flow.sum(1), torch.full((n,), 1 / n))
        torch.testing.assert_close(flow.sum(0), torch.full((m,), 1 / m))
        even = cost.mean()
        assert (flow * cost).sum() <= even + 1e-6
    diagonal = 1 - torch.eye(4)
    torch.testing.assert_close(transport(diagonal), torch.eye(4) / 4)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [(features.hidden_mse, (2, 5, 4)), (features.hidden_ce, (2, 5, 4)), (features.hidden_cosine, (2, 5, 4)),
     (features.attention_mse, (2, 3, 5, 5)), (features.attention_ce, (2, 3, 5, 5))],
)  # fmt: skip
def test_what_stands_at_padding_changes_nothing(loss: Any, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    s, t = torch.rand(2, *shape, generator=draw)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = s.clone()
    other[0, ..., 3:, :] = 9.0
    torch.testing.assert_close(loss(other, t, mask), loss(s, t, mask))
    with pytest.raises(UserError, match="padding alone"):
        loss(s, t, torch.zeros(2, 5))


def test_a_teacher_that_is_not_as_deep_is_refused() -> None:
    with pytest.raises(UserError, match="has 4 layers and the teacher 2"):
        features.hidden_pairs(2, 4, "skip")
    with pytest.raises(UserError, match="emd is for the losses mse and mi, not for cos"):
        TransportedStates(["a", "b"], ["a", "b"], "cos")


def test_pkd_sees_the_first_token_and_no_length() -> None:
    s, t = torch.randn(2, 3, 5, 8)
    other = s.clone()
    other[:, 1:] = 0
    torch.testing.assert_close(features.first_token_distance(7 * other, t), features.first_token_distance(s, t))


def test_padding_and_order_of_texts_leave_the_sequence_critic_alone() -> None:
    torch.manual_seed(0)
    critic = SequenceCritic(8, 16, heads=2, feed_forward=16).eval()
    s, t, mask = torch.randn(3, 4, 8), torch.randn(3, 4, 16), torch.ones(3, 4)
    mask[0, 2:] = 0
    scores, baseline = critic(s, t, mask)
    changed = s.clone()
    changed[0, 2:] = 5.0
    torch.testing.assert_close(critic(changed, t, mask)[0], scores)
    order = [2, 0, 1]
    again, base = critic(s[order], t[order], mask[order])
    torch.testing.assert_close(again, scores[order][:, order])
    torch.testing.assert_close(base, baseline[order])
    with pytest.raises(UserError, match="8 heads do not divide a state's width of 12"):
        SequenceCritic(12, 16)


# ---- networks --------------------------------------------------------------------------------------------------------


def bert(width: int = 16, depth: int = 2, heads: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=30, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                        intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config)


def batch(b: int = 4) -> dict[str, Any]:
    mask = torch.ones(b, 6, dtype=torch.long)
    mask[0, 3:] = 0
    ids = torch.randint(1, 30, (b, 6), generator=torch.Generator().manual_seed(0))
    return {"input": {"input_ids": ids, "attention_mask": mask}, "label": torch.arange(b) % 2, "index": torch.arange(b)}


TASK = Tokens("classify", 30, 8, classes=("a", "b"))


def distillation(pipeline: Pipeline, student: Any, teacher: Any) -> MixedDistillation:
    losses = objectives_of(pipeline, student, teacher)
    made = MixedDistillation(student, FrozenTeacher(teacher), losses, seed=0, task=TASK, mixup=pipeline.mixup)
    return made.build(batch())


def test_taps_are_the_hidden_states_and_attention_that_transformers_gives() -> None:
    model, x = bert(heads=4), batch()["input"]
    model.eval()
    whole = BertForSequenceClassification._from_config(model.config, attn_implementation="eager").eval()
    whole.load_state_dict(model.state_dict())
    expected = whole(**x, output_hidden_states=True, output_attentions=True)
    from stillhouse.signals import Taps

    names = [*hidden_taps(model), *(n for pair in attention_taps(model) for n in pair)]
    taps = Taps(model, names)
    with taps.capture() as got:
        model(**x)
    for name, state in zip(hidden_taps(model), expected.hidden_states, strict=True):
        torch.testing.assert_close(got[name], state, rtol=1e-4, atol=1e-5)
    for (q, k), attention in zip(attention_taps(model), expected.attentions, strict=True):
        made = features.attention_maps(got[q], got[k], 4, x["attention_mask"])
        torch.testing.assert_close(made, attention, rtol=1e-4, atol=1e-5)


def test_models_of_other_layouts_have_taps_or_a_reason() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9))
    assert hidden_taps(gpt) == ["transformer.drop", "transformer.h.0", "transformer.h.1"]
    with pytest.raises(UserError, match="compare hidden states"):
        attention_taps(gpt)
    with pytest.raises(UserError, match="Where a Linear holds its hidden states is not known"):
        hidden_taps(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "between",
    [
        {"loss": "mse"}, {"loss": "cos", "strategy": "last"}, {"loss": "ce"}, {"loss": "pkd"},
        {"loss": "mse", "strategy": "emd"}, {"loss": "attention_mse"}, {"loss": "attention_ce", "strategy": "last"},
        {"loss": "mi", "critic": {"heads": 2}}, {"loss": "mi", "strategy": "emd", "alpha": 0.5},
    ],
)  # fmt: skip
def test_every_pipeline_trains_a_narrower_and_shallower_student(between: dict[str, Any]) -> None:
    student, teacher = bert(8), bert(16, 3, seed=1)
    module = distillation(Pipeline(intermediate=between), student, teacher)
    module.train()
    terms = module(batch(), Progress())
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    layer = student.bert.encoder.layer[0]
    assert layer.attention.self.query.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    own = [p for p in module.parameters() if not any(p is q for q in student.parameters())]
    needs_own = not str(between["loss"]).startswith("attention")
    assert bool(own) == needs_own and all(p.grad is not None for p in own)
    module.close()


def test_a_wider_student_is_refused_where_states_must_be_equal() -> None:
    with pytest.raises(UserError, match="states are 32 wide and the teacher's 16"):
        distillation(Pipeline(intermediate={"loss": "mse"}), bert(32), bert(16))
    with pytest.raises(UserError, match="as many heads"):
        distillation(Pipeline(intermediate={"loss": "attention_mse"}), bert(16, heads=4), bert(16))


def test_both_networks_see_one_mixture_after_the_plain_half() -> None:
    student, teacher = bert(8), bert(16, seed=1)
    module = distillation(Pipeline(mixup=0.4, intermediate=None, weights={"labels": 1.0}), student, teacher)
    seen: dict[str, Tensor] = {}
    for name, net in (("student", student), ("teacher", teacher)):
        net.bert.embeddings.register_forward_pre_hook(lambda *_: None)
        net.bert.embeddings.word_embeddings.register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out.detach()})
        )
    given = batch()
    torch.manual_seed(3)
    module.before_step(given, None)  # type: ignore[arg-type]
    weight, partner = module._mixture
    module(given, Progress())
    for name, net in (("student", student), ("teacher", teacher)):
        table = net.bert.embeddings.word_embeddings.weight
        plain = table[batch()["input"]["input_ids"]]
        torch.testing.assert_close(seen[name][:4], plain)
        torch.testing.assert_close(seen[name][4:], weight * plain + (1 - weight) * plain[partner])
    assert given["input"]["attention_mask"][4:].sum() >= given["input"]["attention_mask"][:4].sum()
    module.after_step(given, Progress(), True)
    module.close()
    plain = student.eval()(**batch()["input"]).logits
    assert plain.shape[0] == 4, "afterwards the student is its plain self"


def test_texts_are_changed_by_the_chain_and_never_to_nothing() -> None:
    ids, draw = np.arange(5, 25), np.random.default_rng(0)
    swapped = augmented(ids, ["swap"], 0.3, ids, draw)
    assert sorted(swapped) == sorted(ids) and (swapped != ids).any()
    assert 0 < len(augmented(ids, ["delete"], 0.5, ids, draw)) < len(ids)
    replaced = augmented(ids, ["unigram"], 0.3, np.array([3]), draw)
    assert 0 < (replaced == 3).sum() < len(ids) and len(replaced) == len(ids)
    assert all(len(augmented(ids[:1], ["delete", "delete"], 0.9, ids, draw)) == 1 for _ in range(20))


# ---- the recommender -------------------------------------------------------------------------------------------------


def trials() -> list[Trial]:
    """A world in which mi is best where there are few samples."""
    out = []
    for name, samples in (("a", 4.0), ("b", 5.0), ("c", 8.0), ("d", 9.0)):
        for loss in ("mse", "mi", "none"):
            for alpha in (0.1, 0.9):
                good = {"mi": 0.9 if samples < 6 else 0.5, "mse": 0.7, "none": 0.3}[loss]
                out.append(Trial(name, {"samples": samples}, {"loss": loss, "alpha": alpha}, good))
    return out


def test_recommendations_hold_on_data_that_was_left_out() -> None:
    found = leave_one_out(trials(), 2)
    assert found["recommended_wins"] == 1 and found["recommended_gain"] > 0.05
    weights = importance(trials())
    assert weights["loss"] > 10 * abs(weights["alpha"])


def test_a_recommender_never_sees_the_scores_it_predicts() -> None:
    mine = trials()
    changed = [Trial(t.data, t.features, t.pipeline, 0.0) if t.data == "a" else t for t in mine]
    rows = [t.pipeline for t in mine if t.data == "a"]
    picks = [Recommender([t for t in world if t.data != "a"]).best("a", {"samples": 4.0}, rows, 2)
             for world in (mine, changed)]  # fmt: skip
    assert picks[0] == picks[1] and rows[picks[0][0]]["loss"] == "mi"
    with pytest.raises(UserError, match="has learned from trials on 'a' itself"):
        Recommender(mine).best("a", {"samples": 4.0}, rows, 1)


def test_candidates_are_the_valid_and_distinct_ones() -> None:
    space = {"intermediate.loss": ["mse", "cos", "mi"], "intermediate.strategy": ["skip", "emd"],
             "intermediate.alpha": [0.1, 0.9]}  # fmt: skip
    auto = AutoSpec(data={"a": "text:sst2", "b": "text:sst2"}, space=space, trials=4)
    found = candidates_of(Pipeline(), auto)
    assert len(found) == 3 + 4, "alpha is mi's alone, and emd is not for cos"
    assert tried(found, auto) == tried(found, auto) and len(tried(found, auto)) == 4
    with pytest.raises(UserError, match=r"auto\.space"):
        candidates_of(Pipeline(), AutoSpec(data=auto.data, space={"intermediate.los": ["mse"]}))


# ---- runs ------------------------------------------------------------------------------------------------------------


def texts(tmp_path: Path, name: str, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(60):
        good = draw.random() < 0.5
        words = draw.choice([["good", "fine", "nice"], ["bad", "poor", "awful"]][0 if good else 1], 3)
        rows.append(f"{' '.join(words)},{'yes' if good else 'no'}")
    path = tmp_path / f"{name}.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return {"name": f"text:{path}", "val": 0.2, "options": {"tokenizer": "bytes", "context": 24}}


NET = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
       "max_position_embeddings": 24}  # fmt: skip


def recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "distiller",
        "evaluate": ["accuracy"],
        "data": texts(tmp_path, "own", 0),
        "teacher": {"model": "hf:config:bert", "options": NET, "train": {"epochs": 1, "batch_size": 8}},
        "student": {"model": "hf:config:bert", "options": NET},
        "train": {"epochs": 1, "batch_size": 8},
        **changes,
    }


def test_a_run_with_every_augmentation_leaves_a_plain_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    pipeline = {
        "augment": {"chain": ["swap", "delete", "unigram"]},
        "mixup": 0.4,
        "intermediate": {"critic": {"heads": 2}},
    }
    execute(validate(recipe(tmp_path, pipeline=pipeline)), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert not any("critic" in name for name in product.module.state_dict())
    assert product.predict(["good nice fine"])[0]["label"] in ("yes", "no")


def test_the_search_tries_pipelines_elsewhere_and_the_best_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    auto = {
        "data": {"a": texts(tmp_path, "a", 1), "b": texts(tmp_path, "b", 2)},
        "space": {"intermediate.loss": ["mse", "cos"], "prediction.loss": ["ce", "mse"]},
        "train": {"epochs": 1, "batch_size": 8},
        "top": 2,
    }
    figures = execute(validate(recipe(tmp_path, auto=auto)), tmp_path / "run", cpu=True)
    assert figures["pipelines_tried"] == 8 and 0 <= figures["recommended_wins"] <= 1
    own = dict(auto, data={"a": texts(tmp_path, "a", 1), "b": texts(tmp_path, "own", 0)})
    with pytest.raises(UserError, match=r"auto.data.b is `data` itself"):
        execute(validate(recipe(tmp_path, auto=own)), tmp_path / "again", cpu=True)
