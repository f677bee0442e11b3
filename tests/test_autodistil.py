"""AutoDistil: sub-networks are views of shared weights, what is cut out is what was trained, and the search keeps to
its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from stillhouse.errors import UserError
from stillhouse.methods.language.autodistil.method import Found, SearchSpec, choice
from stillhouse.methods.language.autodistil.networks import SuperNet, cut_out, whole_of
from stillhouse.methods.language.autodistil.space import Space, SubNet, drawn
from stillhouse.methods.language.autodistil.training import RelationTeacher, Sandwich, relation, relation_distance
from stillhouse.nn.slicing import sliced, spread_layers
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.training.context import Progress

ODD = SubNet(2, 3, 20, 3.0)  # a hidden size that its heads do not divide


def bert(kind: type = BertForMaskedLM, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(**{**sizes, "intermediate_size": 128, "max_position_embeddings": 8, **options})
    made = kind(config).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input": {"input_ids": torch.randint(0, 20, (4, 6), generator=draw), "attention_mask": mask}}


def trained(**options: Any) -> tuple[Sandwich, SuperNet]:
    teacher = bert()
    supernet = SuperNet(teacher).requires_grad_(True).eval()
    nets = Space(depth=[1, 2], hidden=[16, 24], ratio=[2, 3], heads=[2, 3]).members(supernet.whole)
    return Sandwich(supernet, nets, RelationTeacher(teacher), **options), supernet


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("net", [SubNet(3, 4, 32, 4.0), ODD, SubNet(1, 1, 8, 0.5)], ids=str)
def test_a_cut_network_computes_what_the_shared_weights_do(kind: type, net: SubNet) -> None:
    model = bert(kind)
    supernet, alone = SuperNet(model).eval(), cut_out(model, whole_of(model), net).eval()
    inputs = batch()["input"]
    with torch.no_grad():
        torch.testing.assert_close(alone.base_model(**inputs).last_hidden_state, supernet.hidden(net, inputs))
    shared = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    assert not shared & {p.untyped_storage().data_ptr() for p in alone.parameters()}


def test_the_whole_shape_is_the_network_itself() -> None:
    model = bert()
    whole = whole_of(model)
    copy, inputs = cut_out(model, whole, whole.itself).eval(), batch()["input"]
    torch.testing.assert_close(copy(**inputs).logits, model(**inputs).logits)
    assert copy.cls.predictions.decoder.weight is copy.bert.embeddings.word_embeddings.weight


def test_gradients_stay_inside_the_sub_network() -> None:
    module, supernet = trained()
    net = module.nets[0]
    module.distance(net, batch(), module._teacher[0](batch())).backward()
    first = supernet.encoder.encoder.layer[0]
    query = first.attention.self.query.weight.grad
    width = net.heads * supernet.whole.head_size
    assert query[:width, : net.hidden].abs().sum() > 0
    assert query[width:].abs().sum() == 0 and query[:, net.hidden :].abs().sum() == 0
    assert first.output.dense.weight.grad is None, "nothing after the queries, keys and values is computed"
    assert supernet.encoder.encoder.layer[1].attention.self.query.weight.grad is None


def test_a_step_adds_up_the_sandwich() -> None:
    module, _ = trained()
    given, progress = batch(), Progress(step=5)
    terms = module(given, progress)
    targets = module._teacher[0](given)
    parts = [module.distance(module.nets[i], given, targets) for i in drawn(len(module.nets), 5)]
    torch.testing.assert_close(terms["loss"], torch.stack(parts).sum())
    assert terms["largest"] == parts[0] and terms["smallest"] == parts[1]
    again = [drawn(9, step) for step in range(50)]
    assert all(len(set(d)) == 4 and d[:2] == [8, 0] for d in again) and len(set(map(tuple, again))) > 10


def test_the_teacher_is_at_no_distance_from_itself_and_its_heads_have_an_order() -> None:
    module, supernet = trained()
    given = batch()
    targets = module._teacher[0](given)
    assert module.distance(supernet.whole.itself, given, targets) < 1e-8
    mixed = [t[:, [1, 0, 2, 3]] for t in targets]
    assert module.distance(supernet.whole.itself, given, mixed) > 1e-3


@pytest.mark.parametrize("kind", ["scores", "softmax"])
def test_padding_that_is_left_out_changes_nothing(kind: Any) -> None:
    x, y = torch.randn(2, 4, 12), torch.randn(2, 4, 16)
    full = relation_distance([relation(x, 4)] * 3, [relation(y, 4)] * 3, kind, torch.ones(2, 4))
    torch.testing.assert_close(full, relation_distance([relation(x, 4)] * 3, [relation(y, 4)] * 3, kind))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)

    def padded(states: Tensor) -> list[Tensor]:
        return [relation(torch.cat([states, 5 * torch.randn(2, 3, states.shape[-1])], 1), 4, mask)] * 3

    torch.testing.assert_close(relation_distance(padded(x), padded(y), kind, mask), full, rtol=1e-4, atol=1e-6)
    assert relation_distance(padded(x), padded(y), kind, torch.zeros(2, 7)) == 0


def test_features_that_do_not_fill_the_heads_are_left_out() -> None:
    x = torch.randn(1, 3, 14)
    torch.testing.assert_close(relation(x, 4), relation(x[..., :12], 4))
    with pytest.raises(UserError, match="15 relation heads cannot be cut from 14 features"):
        relation(x, 15)


def test_layers_are_spread_in_whole_numbers() -> None:
    for layers in range(1, 25):
        for kept in range(1, layers + 1):
            found = spread_layers(layers, kept)
            assert len(set(found)) == kept and found[0] == 0 and found[-1] < layers and found == sorted(found)
    with pytest.raises(UserError, match="3 layers has none of 4"):
        spread_layers(3, 4)
    with pytest.raises(UserError, match="no weight 'b'"):
        sliced({"a": torch.zeros(2)}, {"b": (1,)}, "layer.", [0])


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"depth": [4]}, "spaces.depth: .* depth of 4, but the teacher has 3"),
        ({"hidden": [64]}, "spaces.hidden: .* 64, but the teacher has 32"),
        ({"heads": [5]}, "spaces.heads"),
        ({"ratio": [9]}, "spaces.ratio"),
    ],
)
def test_a_space_beyond_the_teacher_is_refused(space: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Space(**{"depth": [2], "hidden": [16], "ratio": [2], "heads": [2], **space}).members(whole_of(bert()))


def test_a_space_that_is_too_small_and_another_kind_of_network_are_refused() -> None:
    with pytest.raises(UserError, match="the space holds 3 in all"):
        drawn(3, 0)
    with pytest.raises(UserError, match="the teacher is a GPT2LMHeadModel"):
        SuperNet(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)))


def test_the_search_keeps_to_its_limit() -> None:
    found = [Found("s", SubNet(1, 1, w, 2.0), 1 / w, w / 40) for w in (8, 12, 16, 24)]
    assert choice(SearchSpec(max_cost=0.5), found, [], 0).net.hidden == 16
    assert choice(SearchSpec(max_cost=0.5, choose="smallest"), found, [], 0).net.hidden == 8
    assert choice(SearchSpec(max_cost=0.5, choose="largest"), found, [], 0).net.hidden == 16
    ranked = [(found[0], 0.9), (found[1], 0.5), (found[3], 1.0)]
    assert choice(SearchSpec(max_cost=0.5, choose="proxy"), found, ranked, 0) == found[0]
    with pytest.raises(UserError, match=r"max_cost 0.1: no sub-network is as cheap; .* costs 0.2 of the teacher"):
        choice(SearchSpec(max_cost=0.1), found, [], 0)


RECIPE = {
    "method": "autodistil",
    "evaluate": ["quality"],
    "teacher": {
        "model": "hf:config:bert",
        "options": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                    "max_position_embeddings": 16},
        "train": {"epochs": 1, "batch_size": 8},
    },
    "spaces": {"a": {"depth": [1, 2], "hidden": [10, 12], "ratio": [2], "heads": [3]}},
    "search": {"batches": 1, "batch_size": 4},
    "train": {"epochs": 1, "batch_size": 8},
    "fine_tune": {"epochs": 1, "batch_size": 8},
}  # fmt: skip


def data(tmp_path: Path, **options: Any) -> dict[str, Any]:
    path = tmp_path / "texts.csv"
    rows = [f"{'good' if i % 2 else 'bad'} thing {i},{'yes' if i % 2 else 'no'}" for i in range(40)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return {"name": f"text:{path}", "val": 0.2, "options": {"tokenizer": "characters", "context": 16, **options}}


def test_a_product_of_odd_heads_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    search = {"max_cost": 0.9, "choose": "largest", "batches": 1, "batch_size": 4}
    execute(validate({**RECIPE, "search": search, "data": data(tmp_path)}), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert (product.net.hidden, product.net.heads) in ((10, 3), (12, 3))
    assert product.module.base_model.encoder.layer[0].attention.self.query.weight.shape == (12, product.net.hidden)
    assert {p["label"] for p in product.predict(["good thing", "bad thing"])} <= {"yes", "no"}
    saved = product.module.state_dict()
    again = load_product(tmp_path / "run").module.state_dict()
    assert all(torch.equal(saved[k], again[k]) for k in saved)


def test_an_interrupted_supernet_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"epochs": 2, "batch_size": 4, "checkpoint_seconds": 0, "log_every": 1}
    config = validate(
        {**RECIPE, "data": data(tmp_path), "train": train, "fine_tune": None, "search": {"max_cost": 0.9}}
    )
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "whole"))
    execute(config, tmp_path / "a", cpu=True)
    expected = load_product(tmp_path / "a").module.state_dict()
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "broken"))
    plain, steps = Sandwich.forward, []

    def stopped(self: Sandwich, given: Any, progress: Progress) -> Any:
        steps.append(progress.step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return plain(self, given, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sandwich, "forward", stopped)
        execute(config, tmp_path / "b", cpu=True)
    execute(config, tmp_path / "b", cpu=True)
    found = load_product(tmp_path / "b").module.state_dict()
    assert steps == [0, 1, 2, 3, 4] and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"task": "causal"}, "autodistil is for encoders, but data.options.task is causal"),
        ({"val": 0.0}, "set data.val to a share above 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], match: str
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    found = data(tmp_path, **{k: v for k, v in change.items() if k == "task"})
    with pytest.raises(UserError, match=match):
        execute(validate({**RECIPE, "data": {**found, **{k: v for k, v in change.items() if k == "val"}}}),
                tmp_path / "run", cpu=True)  # fmt: skip
