"""Unified Embedding: hashes are even, independent and the same everywhere; one table serves all features; collisions
are as counted; models save and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.methods.compression.unified_embedding.columns import TableSpec, load_columns
from stillhouse.methods.compression.unified_embedding.hashing import MISSING, bucket, encode, salt
from stillhouse.methods.compression.unified_embedding.method import build_network
from stillhouse.methods.compression.unified_embedding.network import mean_angle
from stillhouse.methods.compression.unified_embedding.table import Feature, UnifiedEmbedding, collisions
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

ROOT = Path(__file__).parents[1]


def test_rows_are_uniform_for_consecutive_ids():
    counts = torch.bincount(bucket(torch.arange(100_000), torch.tensor(salt(0, 0)), 97), minlength=97).double()
    statistic = float(((counts - 1e5 / 97) ** 2 / (1e5 / 97)).sum())
    assert chi2.sf(statistic, 96) > 1e-3


def test_salts_of_features_and_chunks_are_independent():
    ids = torch.arange(50_000)
    rows = {(t, k): bucket(ids, torch.tensor(salt(t, k)), 101) for t in range(3) for k in range(2)}
    keys = list(rows)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            rate = (rows[a] == rows[b]).double().mean().item()
            assert abs(rate - 1 / 101) < 4 * (1 / 101 / 50_000) ** 0.5


def test_words_and_numbers_get_the_same_codes_in_every_process():
    code = (
        "from stillhouse.methods.compression.unified_embedding.hashing import *; import torch; c = encode(['a', 'é', "
        "7, -1, None]); print(c.tolist(), bucket(c, torch.tensor(salt(2, 1)), 1000).tolist())"
    )
    first = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "1"}, check=True
    ).stdout
    codes = encode(["a", "é", 7, -1, None])
    assert first.strip() == f"{codes.tolist()} {bucket(codes, torch.tensor(salt(2, 1)), 1000).tolist()}"
    assert codes[2:].tolist() == [7, -1, MISSING] and bucket(codes, torch.tensor(0), 3).min() >= 0
    with pytest.raises(UserError, match=r"given: 0\.5 \(float\)"):
        encode([1, 0.5])


def table(
    scheme: str = "hash", shared: bool = True, rows: int = 60, chunks: tuple[int, ...] = (1, 2, 1), tables: int = 1
) -> UnifiedEmbedding:
    torch.manual_seed(0)
    features = [Feature(n, c, s) for n, c, s in zip("abc", chunks, (50, 20, 5))]
    return UnifiedEmbedding(features, rows, 8, scheme=scheme, shared=shared, tables=tables)


@pytest.mark.parametrize(
    ("scheme", "shared"),
    [
        ("hash", True),
        ("hash", False),
        ("exact", False),
        ("sum", True),
        ("sum", False),
        ("quotient", True),
        ("quotient", False),
        ("robe", True),
        ("robe", False),
    ],
)
def test_every_scheme_gives_each_feature_its_width_within_its_rows(scheme: str, shared: bool):
    t = table(scheme, shared)
    codes = torch.stack([torch.arange(40) % 50, torch.arange(40) % 20, torch.arange(40) % 5], 1)
    out = t(codes)
    assert out.shape == (40, 8 + 16 + 8) and len(t.weight) <= (75 if scheme == "exact" else 60)
    by_name = t({n: codes[:, i] for i, n in enumerate("abc")})
    assert torch.equal(out, by_name)
    out.sum().backward()
    assert t.weight.grad.abs().sum() > 0
    if not shared:  # a slice of its own: what one feature writes no other reads
        t.weight.grad = None
        t.lookup("c", codes[:, 2]).sum().backward()
        touched = t.weight.grad.abs().sum(1) > 0
        t.weight.grad = None
        t.lookup("a", codes[:, 0]).sum().backward()
        assert not (touched & (t.weight.grad.abs().sum(1) > 0)).any()


def test_quotient_and_remainder_tell_all_values_apart_where_rows_suffice():
    t = UnifiedEmbedding([Feature("a", 1, 100)], 30, 4, scheme="quotient", shared=False)
    places = t.places(torch.arange(100)[:, None]).squeeze(1)
    assert len({tuple(p) for p in places.tolist()}) == 100


def test_without_collisions_one_feature_is_an_ordinary_embedding():
    t = UnifiedEmbedding([Feature("a", 1, 12)], 12, 4, scheme="exact")
    codes = torch.randint(12, (30, 1))
    assert torch.equal(t(codes), F.embedding(codes[:, 0], t.weight))
    assert torch.equal(t(torch.tensor([[12], [-5]])), t.weight[:1].expand(2, 4)), (
        "an unknown value reads row 0, not another feature's"
    )


def test_equal_ids_of_two_features_and_the_chunks_of_one_do_not_read_the_same_rows():
    t = UnifiedEmbedding([Feature("user", 2), Feature("item", 2)], 1000, 4)
    places = t.places(torch.arange(500)[:, None].expand(-1, 4)).squeeze(-1)
    for i in range(4):
        for j in range(i):
            assert (places[:, i] == places[:, j]).double().mean() < 0.01


def test_lists_of_values_are_pooled_and_empty_lists_are_zeros():
    t = table()
    values, starts = torch.tensor([3, 4, 4, 9]), torch.tensor([0, 2, 2])
    one = {"b": torch.zeros(3, dtype=torch.int64), "c": torch.zeros(3, dtype=torch.int64)}
    total, mean = t({"a": (values, starts), **one}), t({"a": (values, starts), **one}, pool="mean")
    e = t.lookup("a", values)
    assert torch.allclose(total[:, :8], torch.stack([e[0] + e[1], torch.zeros(8), e[2] + e[3]]), atol=1e-7)
    assert torch.allclose(mean[0, :8], (e[0] + e[1]) / 2, atol=1e-7)
    dense = t({"a": torch.tensor([[3, 4], [1, 2], [4, 9]]), **one})
    assert torch.allclose(dense[0, :8], total[0, :8], atol=1e-7)
    assert t.lookup("b", torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 16), "or the axis of values is kept"
    with pytest.raises(UserError, match="must rise from 0"):
        t({"a": (values, torch.tensor([0, 3, 1])), **one})


def test_gradients_of_a_shared_row_add_up_over_features_as_derived():
    torch.manual_seed(1)
    t = UnifiedEmbedding([Feature(n) for n in "abcd"], 7, 3).double()
    theta, x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(30, (50, 4)), torch.randint(2, (50,)).double()
    z = (t(x).view(50, 4, 3) * theta).sum((1, 2))
    F.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
    error = (z.sigmoid() - y).detach()
    places = t.places(x).squeeze(-1)
    g = torch.zeros(4, 7, dtype=torch.float64)
    for feature in range(4):
        g[feature].index_add_(0, places[:, feature], error)
    assert torch.allclose(t.weight.grad, g.T @ theta, atol=1e-10)
    theta = torch.eye(4, 6, dtype=torch.float64) * torch.tensor([[2.0], [0.5], [3.0], [1.0]], dtype=torch.float64)
    wide = UnifiedEmbedding([Feature(n) for n in "abcd"], 7, 6).double()
    z = (wide(x).view(50, 4, 6) * theta).sum((1, 2))
    F.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
    error, g = (z.sigmoid() - y).detach(), torch.zeros(4, 7, dtype=torch.float64)
    for feature in range(4):
        g[feature].index_add_(0, places[:, feature], error)
        # where features' weights are orthogonal, a feature feels its own collisions alone
        assert torch.allclose(wide.weight.grad @ theta[feature], theta[feature].square().sum() * g[feature], atol=1e-10)


def test_training_turns_features_that_share_a_small_table_apart():
    torch.manual_seed(0)
    t = UnifiedEmbedding([Feature(n) for n in "abcdef"], 10, 8)
    theta = torch.nn.Parameter(torch.randn(1, 8).repeat(6, 1) + 0.01 * torch.randn(6, 8))
    x = torch.randint(20, (2000, 6))
    truth = torch.randn(6, 20)
    y = (truth[torch.arange(6), x].sum(1) > 0).float()
    optimizer = torch.optim.Adam([t.weight, theta], lr=0.02)
    before = mean_angle(theta.detach())
    for _ in range(200):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits((t(x).view(-1, 6, 8) * theta).sum((1, 2)), y).backward()
        optimizer.step()
    assert before < 5 and mean_angle(theta.detach()) > 40


@pytest.mark.parametrize(("shared", "tables"), [(True, 1), (True, 2), (False, 1)])
def test_collisions_are_counted_as_random_hashing_predicts(shared: bool, tables: int):
    sizes = {"a": 4000, "b": 1000, "c": 2000}
    t = UnifiedEmbedding(
        [Feature(n, 2 if n == "b" else 1, s) for n, s in sizes.items()], 1400, 4, shared=shared, tables=tables
    )
    found = collisions(t, {n: torch.arange(s) for n, s in sizes.items()})
    for name, n in sizes.items():
        f = found[name]
        # the number of colliding pairs is close to Poisson with mean n (n - 1) / 2M
        assert abs(f["same"] - f["same_expected"]) < 3 * (2 * f["same_expected"] / n) ** 0.5
        assert abs(f["other"] - f["other_expected"]) <= 0.08 * f["other_expected"]
    if shared:
        assert found["a"]["same_expected"] == pytest.approx(3999 / 1400)
    else:
        assert (
            found["a"]["same_expected"] == pytest.approx(3999 / 800)
            and found["a"]["other"] == found["a"]["other_expected"] == 0
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], 10, 4), "no feature"),
        (([Feature("a"), Feature("a")], 10, 4), "two features are called 'a'"),
        (([Feature("a")], 0, 4), "rows must be a whole number"),
        (([Feature("a")], 10, 2.5), "dim must be a whole number"),
        (([Feature("a", 0)], 10, 4), "chunks of 'a'"),
    ],
)
def test_impossible_tables_are_refused(arguments: tuple, says: str):
    with pytest.raises(UserError, match=says):
        UnifiedEmbedding(*arguments)


def test_a_split_table_needs_sizes_and_a_tiny_one_is_warned_of():
    with pytest.raises(UserError, match="need the size of every feature"):
        UnifiedEmbedding([Feature("a")], 10, 4, shared=False)
    with pytest.warns(UserWarning, match="fewer than the 3 features"):
        table(rows=2, chunks=(1, 1, 1))(torch.zeros(4, 3, dtype=torch.int64))


def test_weights_of_other_features_or_another_order_are_refused():
    t = table()
    held = t.state_dict()
    other = UnifiedEmbedding([Feature("b", 1, 20), Feature("a", 2, 50), Feature("c", 1, 5)], 60, 8)
    with pytest.raises(UserError, match="feature 0 'a'"):
        other.load_state_dict(held)
    table().load_state_dict(held)
    with pytest.raises(UserError, match="There is no feature 'z'"):
        t({"z": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(UserError, match="no values for the feature 'c'"):
        t({"a": torch.zeros(1, dtype=torch.int64), "b": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"must be \(B, 3\)"):
        t(torch.zeros(4, 2, dtype=torch.int64))


def shop(path: Path, rows: int = 300) -> Path:
    r = np.random.default_rng(0)
    user, item = r.integers(30, size=rows), r.integers(12, size=rows)
    price = r.uniform(1, 9, rows)
    bought = (r.normal(size=30)[user] + r.normal(size=12)[item] + 0.3 * (price - 5) > 0).astype(int)
    lines = [
        "user,item,price,bought",
        *(
            f"{'' if i % 50 == 0 else f'u{u}'},{j},{p:.2f},{'yes' if b else 'no'}"
            for i, (u, j, p, b) in enumerate(zip(user, item, price, bought))
        ),
    ]
    path.write_text("\n".join(lines))
    return path


def recipe(path: Path, **changes: object) -> dict:
    train = {"epochs": 4, "batch_size": 32, "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0}, "best": "auc"}
    data = {"name": f"csv:{path}", "label": "bought", "dense": ["price"]}
    return {
        "method": "unified_embedding",
        "data": data,
        "embedding": {"share": 0.5, "dim": 4},
        "head": {"cross": 1, "hidden": [16]},
        "train": train,
        **changes,
    }


@pytest.mark.parametrize("scheme", ["unified", "collisionless"])
def test_a_csv_becomes_a_model_that_loads_and_tells_new_rows(tmp_path: Path, scheme: str):
    path = shop(tmp_path / "shop.csv")
    embedding = {"scheme": scheme, "share": 0.5, "dim": 4, "chunks": {"user": 2}}
    figures = execute(validate(recipe(path, embedding=embedding)), tmp_path / "run", cpu=True)
    assert figures["auc"] > 0.6 and figures["parameters"] > figures["table_parameters"] > 0
    model = load_product(tmp_path / "run")
    rows = {"user": ["u1", "someone new", None], "item": ["3", "3", "3"], "price": [2.0, 3.0, 4.0], "clerk": [0, 0, 0]}
    probs = model.probabilities(rows)
    assert probs.shape == (3, 2) and torch.allclose(probs.sum(1), torch.ones(3))
    assert torch.equal(probs, load_product(tmp_path / "run").probabilities(rows))
    with pytest.raises(UserError, match="'price'"):
        model.probabilities({"user": ["u1"], "item": ["3"]})


def test_the_curve_of_schemes_and_budgets_is_drawn(tmp_path: Path):
    path = shop(tmp_path / "shop.csv", 120)
    figures = execute(
        validate(recipe(path, pareto={"shares": [1, 0.2], "schemes": ["unified", "hashing"]})),
        tmp_path / "run",
        cpu=True,
    )
    assert {"auc_unified_1", "auc_unified_0.2", "auc_hashing_1", "table_parameters_hashing_0.2"} <= set(figures)
    assert (tmp_path / "run" / "pareto.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"name": "csv:nowhere.csv"}}, "There is no file"),
        ({"data": "csv"}, "There is no table"),
        ({"embedding": {"dim": 4}}, "exactly one of share and rows"),
        ({"embedding": {"share": 0.1, "chunks": {"usr": 2}}}, "did you mean 'user'"),
        ({"embedding": {"share": 0.1, "chunks": 0}}, "chunks must be at least 1"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, change: dict, says: str):
    path = shop(tmp_path / "shop.csv")
    with pytest.raises(UserError, match=says):
        execute(validate(recipe(path, **change)), tmp_path / "run", cpu=True)


def test_a_wrong_column_is_named(tmp_path: Path):
    path = shop(tmp_path / "shop.csv")
    with pytest.raises(UserError, match="There is no column 'bougth'; did you mean 'bought'"):
        load_columns(TableSpec(name=f"csv:{path}", label="bougth"))
    with pytest.raises(UserError, match="not a number"):
        load_columns(TableSpec(name=f"csv:{path}", label="bought", dense=["item", "user"]))


def test_a_tenth_of_the_rows_costs_a_shared_table_little_and_split_tables_much():
    spec = TableSpec(name=f"file:{ROOT}/recipes/compression/columns_of.py:digits", test=0.33)
    data = load_columns(spec)
    words = data.vocabularies()
    features = [Feature(n, 1, len(w)) for n, w in zip(data.names, words)]
    scores = {}
    from stillhouse.methods.compression.unified_embedding.method import EmbeddingSpec, HeadSpec

    for scheme in ("unified", "hashing"):
        torch.manual_seed(0)
        network = build_network(
            features, EmbeddingSpec(scheme=scheme, share=0.03), HeadSpec(), round(0.03 * sum(map(len, words))), 0, 10
        )
        train, test = (data.part(s, lambda c: c) for s in ("train", "test"))
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        for _ in range(3):
            for rows in torch.randperm(len(train)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(train.codes[rows]), train.targets[rows]).backward()
                optimizer.step()
        scores[scheme] = test.scores(network, torch.device("cpu"))["accuracy"]
    assert scores["unified"] > scores["hashing"] + 0.1
