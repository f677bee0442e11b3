"""Claims and their verdicts: the arithmetic as properties, what is refused, what is stale, and what is reused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stillhouse.config.reading import read_yaml
from stillhouse.errors import UserError
from stillhouse.evaluation.quantities import quantity
from stillhouse.evaluation.statistics import mean_interval, paired_difference
from stillhouse.reporting.comparison import write_comparison_report
from stillhouse.reporting.rows import compare
from stillhouse.reporting.verdicts import Verdict, verdict_lines
from stillhouse.runs.claims import judge, read_claims
from stillhouse.runs.evidence import Library, recipe_hash
from stillhouse.runs.sources import source_files, source_hash

TREE: dict[str, Any] = {
    "data": "digits",
    "student": "stillhouse:mlp",
    "objectives": ["ce"],
    "variants": {"kd": {"seed": 1}, "same": {}},
}


def claim(**keys: Any) -> dict[str, Any]:
    return {"says": "It helps.", "figure": "accuracy", "of": "kd", **keys}


def row(variant: str | None, values: list[float], figure: str = "accuracy", **facts: Any) -> dict[str, Any]:
    seeds = list(range(len(values)))
    return {
        "label": variant or "x",
        "recipe": "x.yaml",
        "variant": variant,
        "seeds": seeds,
        "metrics": {figure: values},
        **facts,
    }


def verdict(given: dict[str, Any], *rows: dict[str, Any], tree: dict[str, Any] = TREE) -> Verdict:
    (found,) = judge({**tree, "claims": [given]}, {"x": list(rows)})
    return found


@pytest.mark.parametrize("seed", range(30))
def test_a_verdict_is_where_the_paired_interval_lies(seed: int) -> None:
    draw = random.Random(seed)
    n, shift, by = draw.randint(2, 8), draw.uniform(-0.05, 0.08), draw.choice([0.0, 1.0, 3.0])
    ours = [0.8 + shift + draw.gauss(0, 0.01) for _ in range(n)]
    theirs = [0.8 + draw.gauss(0, 0.01) for _ in range(n)]
    gain = paired_difference([100 * v for v in ours], [100 * v for v in theirs])
    wanted = "shown" if gain.low > by else "contradicted" if gain.high < 0 else "not shown"
    found = verdict(claim(over="base", by=by), row("kd", ours), row(None, theirs))
    assert (found.verdict, found.seeds) == (wanted, n)
    assert (found.mean, found.low, found.high) == pytest.approx((gain.mean, gain.low, gain.high))
    if by == 0:  # the other way round the signs change, and with them what is shown
        turned = verdict(claim(of="base", over="kd"), row("kd", ours), row(None, theirs))
        assert turned.verdict == {"shown": "contradicted", "contradicted": "shown"}.get(wanted, wanted)
        assert (turned.low, turned.high) == pytest.approx((-gain.high, -gain.low))


def test_a_figure_of_which_less_is_better_turns_the_difference() -> None:
    lower, upper = [1.0, 1.1, 1.05], [1.5, 1.62, 1.54]
    assert (
        verdict(claim(figure="nll", over="base"), row("kd", lower, "nll"), row(None, upper, "nll")).verdict == "shown"
    )
    assert (
        verdict(claim(figure="nll", over="base"), row("kd", upper, "nll"), row(None, lower, "nll")).verdict
        == "contradicted"
    )
    own = claim(figure="my_figure", over="base", better="higher")
    assert verdict(own, row("kd", upper, "my_figure"), row(None, lower, "my_figure")).verdict == "shown"
    assert (
        verdict({**own, "better": "lower"}, row("kd", upper, "my_figure"), row(None, lower, "my_figure")).verdict
        == "contradicted"
    )


def test_amounts_are_in_the_unit_of_the_reports() -> None:
    rows = row("kd", [0.82, 0.83, 0.84]), row(None, [0.80, 0.81, 0.82])
    assert verdict(claim(over="base", by=1.9), *rows).verdict == "shown", "two percentage points"
    assert verdict(claim(over="base", by=2.1), *rows).verdict == "not shown"
    assert verdict(claim(at_least=80), *rows).verdict == "shown"
    assert verdict(claim(at_least=90), *rows).verdict == "contradicted"
    assert verdict(claim(at_least=83), *rows).verdict == "not shown"
    assert verdict(claim(at_most=90), *rows).verdict == "shown"
    assert verdict(claim(at_most=70), *rows).verdict == "contradicted"


def test_within_allows_a_loss_and_no_more() -> None:
    loss = row("kd", [0.790, 0.801, 0.811]), row(None, [0.80, 0.81, 0.82])  # about one point
    assert verdict(claim(over="base", within=2), *loss).verdict == "shown"
    assert verdict(claim(over="base", within=0.5), *loss).verdict == "contradicted"
    assert verdict(claim(over="base"), *loss).verdict == "contradicted"


@pytest.mark.parametrize("bound", [80.0, 82.0, 83.0, 86.0])
def test_a_bound_is_compared_with_the_interval_of_the_mean(bound: float) -> None:
    values = [0.82, 0.83, 0.84]
    low, high = (100 * x for x in mean_interval(values))
    found = verdict(claim(at_least=bound), row("kd", values))
    assert found.verdict == ("shown" if low >= bound else "contradicted" if high < bound else "not shown")
    assert (found.low, found.high) == pytest.approx((low, high))


def test_without_rows_nothing_is_measured_and_one_seed_has_no_interval() -> None:
    assert verdict(claim(over="base"), row(None, [0.8, 0.8])).verdict == "not measured"
    assert verdict(claim(at_least=3)).verdict == "not measured"
    assert (
        verdict(claim(figure="nll", over="base"), row("kd", [0.8, 0.8]), row(None, [0.8, 0.8])).verdict
        == "not measured"
    ), "no such figure"
    one = verdict(claim(over="base"), row("kd", [0.9]), row(None, [0.8]))
    assert (one.verdict, one.low, one.note) == ("not shown", None, "No interval: one seed")
    why = verdict(claim(over="base", because="It takes 40 hours on two cores.")).why
    assert why == "It takes 40 hours on two cores."


def test_only_seeds_of_both_rows_count_and_failed_ones_do_not() -> None:
    ours, theirs = row("kd", [0.9, 0.91, 0.92, 0.5]), row(None, [0.8, 0.81, 0.82])
    assert verdict(claim(over="base"), ours, theirs).seeds == 3
    ours["metrics"]["accuracy"][0] = None
    assert verdict(claim(over="base"), ours, theirs).seeds == 2


def test_a_variant_that_overrides_nothing_is_the_recipe_itself() -> None:
    for name in ("base", "same"):
        for recorded in (None, "same"):
            assert verdict(claim(over=name), row("kd", [0.9, 0.91]), row(recorded, [0.8, 0.81])).verdict == "shown"


def test_groups_are_judged_apart_and_rows_of_two_groups_can_be_compared() -> None:
    tree = {**TREE, "groups": {"student": {"small": "a", "large": "b"}}}
    rows = [row(v, [base + 0.001 * i for i in range(3)], group=g) for v, g, base in _GROUPED]
    found = judge({**tree, "claims": [claim(over="base")]}, {"x": rows})
    assert [(v.group, v.verdict) for v in found] == [("small", "shown"), ("large", "contradicted")]
    found = judge({**tree, "claims": [claim(of="kd/small", over="base/large")]}, {"x": rows})
    assert [(v.group, round(v.mean or 0, 6)) for v in found] == [("small", -10.0)]


_GROUPED = [("kd", "small", 0.8), (None, "small", 0.7), ("kd", "large", 0.8), (None, "large", 0.9)]


def test_rows_of_unequal_data_or_steps_or_networks_get_no_interval() -> None:
    ours, theirs = row("kd", [0.9, 0.91, 0.92]), row(None, [0.8, 0.81, 0.82])
    for facts, other, words in (
        ({"data": "a"}, {"data": "b"}, "different data"),
        ({"steps": {"student": 200, "teacher": 5}}, {"steps": {"student": 100}}, "200 steps of the stage 'student'"),
    ):
        found = verdict(claim(over="base"), {**ours, **facts}, {**theirs, **other})
        assert (found.verdict, found.low) == ("not shown", None) and words in found.why
        note = compare({"baseline": "x", "rows": [{**ours, **facts}, {**theirs, **other}]}).note
        assert words in note and "No interval" in note
    assert (
        verdict(claim(over="base"), {**ours, "steps": {"student": 101}}, {**theirs, "steps": {"student": 100}}).verdict
        == "shown"
    )
    ours["metrics"]["parameters"] = [10, 20, 10]
    assert "10 to 20 parameters" in verdict(claim(over="base"), ours, theirs).why
    assert verdict(claim(over="base"), {**ours, "searches": True}, theirs).verdict == "shown"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (claim(over="bse"), r"claims.0.over: no row 'bse'; did you mean 'base'\?"),
        (claim(of="teacher", at_least=1), "claims.0.of: no row 'teacher'; there are: base, kd, same"),
        (
            claim(figure="acuracy", over="base"),
            r"claims.0.figure: There is no figure 'acuracy'; did you mean 'accuracy'",
        ),
        (claim(figure="accuracy_random", over="base"), "no direction that is better"),
        (claim(), "give exactly one of over, at_least, at_most"),
        (claim(over="base", at_least=3), "give exactly one of"),
        (claim(at_least=3, by=1), "needs `over`"),
        (claim(over="base", by=-1), "claims.0.by' must be at least 0"),
        (claim(over="base", ove="base"), "unknown key 'claims.0.ove'; did you mean 'claims.0.over'"),
        ({"figure": "accuracy", "of": "kd", "over": "base"}, "'claims.0.says' is missing"),
    ],
)
def test_a_wrong_claim_is_refused_in_a_sentence(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_claims({**TREE, "claims": [given]}, "x.yaml")


def test_a_wrong_claim_is_refused_as_the_recipe_is_read(command: Any) -> None:
    Path("r.yaml").write_text(json.dumps({**TREE, "claims": [claim(over="bse")]}))
    for name in ("run", "bench"):
        code, _, err = command(name, "r.yaml")
        assert code == 2 and "did you mean 'base'?" in err


def test_claims_change_neither_a_recipe_nor_its_hash(command: Any) -> None:
    Path("a.yaml").write_text(json.dumps(TREE))
    Path("b.yaml").write_text(json.dumps({**TREE, "claims": [claim(over="base")]}))
    plain, claimed = (command("run", f"{n}.yaml", "--dry-run", "--set", "name=x")[1] for n in "ab")
    assert "claims" not in claimed and plain == claimed


def test_the_hash_of_a_recipe_is_of_what_is_written_but_name_and_seed() -> None:
    tree = {"data": "digits", "train": {"epochs": 2}}
    assert recipe_hash(tree) == recipe_hash({"train": {"epochs": 2}, "name": "x", "seed": 3, "data": "digits"})
    assert recipe_hash(tree) != recipe_hash({"data": "digits", "train": {"epochs": 3}})


def test_the_hash_of_the_code_is_that_of_what_a_method_imports(tmp_path: Path) -> None:
    files = {p.name for p in source_files({"objectives": ["kd", "crd"]})}
    assert {"kd.py", "crd.py", "distillation.py", "engine.py"} <= files and "pld.py" not in files
    tree = {"objectives": ["ce"], "data": "file:own.py:numbers"}
    own = tmp_path / "own.py"
    seen = []
    for text in ("x = 1\n", '"""Words."""\nx   = 1  # more words\n', "x = 2\n"):
        own.write_text(text)
        seen.append(source_hash(tree, tmp_path))
    assert seen[0] == seen[1], "comments, docstrings and layout do not count"
    assert seen[1] != seen[2]
    assert source_hash({"objectives": ["ce"]}) != source_hash({"objectives": ["ce", "kd"]})


QUICK = {
    "data": {"name": "digits", "size": 60, "test_size": 60},
    "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
    "objectives": ["ce"],
    "train": {"epochs": 2, "batch_size": 30},
    "variants": {"longer": {"train.epochs": 4}, "other": {"train.optimizer.lr": 1.0e-6}},
    "claims": [
        {"says": "It learns.", "figure": "accuracy", "of": "base", "over": "other", "because": "It is short."},
        {"says": "More steps help.", "figure": "accuracy", "of": "longer", "over": "base"},
    ],
}


@pytest.fixture
def project(command: Any) -> Any:
    """The command, in a folder with a recipe and its evidence."""
    Path("recipes").mkdir()
    Path("recipes/quick.yaml").write_text(json.dumps(QUICK))
    assert (
        command(
            "bench", "recipes/quick.yaml", "--seeds", "0,1", "--cpu", "--out", "b", "--evidence", "evidence/quick.json"
        )[0]
        == 0
    )
    return command


def test_a_bench_judges_claims_and_its_evidence_goes_stale(project: Any) -> None:
    path = Path("evidence/quick.json")
    results = json.loads(path.read_text())
    assert [c["says"] for c in results["claims"]] == ["It learns.", "More steps help."]
    assert "No interval" in results["claims"][1]["note"] and "steps" in results["claims"][1]["note"]
    assert all(len(r["recipe_hash"]) == len(r["source_hash"]) == 16 and r["steps"]["student"] for r in results["rows"])
    assert "It learns." in write_comparison_report(results, Path("r.html")).read_text()

    code, out, _ = project("evidence", "--check")
    assert code == 0 and "stale" not in out
    Path("recipes/quick.yaml").write_text(json.dumps({**QUICK, "claims": [QUICK["claims"][0]]}))  # type: ignore[index]
    assert project("evidence", "--check")[0] == 0, "claims are no part of what was run"
    assert "quick.json" in project("evidence", "--verdicts")[1]
    assert len(json.loads(path.read_text())["claims"]) == 1
    assert "quick.json" not in project("evidence", "--verdicts")[1], "the same again changes nothing"

    Path("recipes/quick.yaml").write_text(
        json.dumps({**QUICK, "variants": {**QUICK["variants"], "other": {"seed": 4}}})
    )  # type: ignore[dict-item]
    code, out, _ = project("evidence", "--check")
    assert code == 1 and "quick.json: the recipe has changed: other" in out and "longer" not in out
    results["rows"][0]["source_hash"] = "0" * 16
    del results["rows"][1]["recipe_hash"], results["rows"][2]["recipe_hash"]
    path.write_text(json.dumps(results))
    code, out, _ = project("evidence", "--check")
    assert (
        code == 1 and "the code has changed: quick" in out and "unknown: recorded before rows had hashes: quick" in out
    )
    code, out, _ = project("evidence", "quick", "--report", "claims.html")
    assert code == 0 and "It learns." in Path("claims.html").read_text()
    assert project("evidence", "quik")[0] == 2


def test_a_run_of_other_code_is_run_again(project: Any) -> None:
    again = ["bench", "recipes/quick.yaml", "--seeds", "0,1", "--cpu", "--out", "b"]
    assert "[1/" not in project(*again)[2], "what is done is reused"
    recorded = Path("b/sources.json")
    hashes = json.loads(recorded.read_text())
    assert set(hashes) == {f"{label}-s{seed}" for label in ("quick", "longer", "other") for seed in (0, 1)}
    recorded.write_text(json.dumps({**hashes, "other-s1": "0" * 16}))
    err = project(*again)[2]
    assert "[1/1] other-s1 done" in err and "not of the present code" in err
    assert json.loads(recorded.read_text()) == hashes


def test_a_row_of_several_networks_is_refused(project: Any) -> None:
    held = Path("b/other-s1/evaluation.json")
    held.write_text(json.dumps({**json.loads(held.read_text()), "parameters": 3}))
    code, _, err = project("bench", "recipes/quick.yaml", "--seeds", "0,1", "--cpu", "--out", "b")
    assert code == 2 and "'other' differs between seeds" in err and "searches = True" in err


def test_a_verdict_survives_its_record() -> None:
    made = Verdict(
        "It helps.", "accuracy", "kd", "shown", over="base", by=1, mean=2.0, low=0.0, high=3.0, seeds=3, because="So."
    )
    record = json.loads(json.dumps(made.record()))
    assert Verdict.from_record({**record, "later": 1}) == made
    assert (
        "better than base by more than 1 point" in made.expected
        and made.measured == "+2.00 [+0.00, +3.00] points, 3 seeds"
    )
    assert len(verdict_lines([made])) == 3


def test_the_projects_own_evidence_is_read_and_its_verdicts_are_current() -> None:
    root = Path(__file__).parents[1]
    library = Library.read(root / "recipes", root / "evidence")
    claimed = library.claimed()
    for name, results in library.results.items():
        recorded = [(c["recipe"], c["says"], c.get("group"), c["verdict"]) for c in results.get("claims", ())]
        now = [(n, v.says, v.group, v.verdict) for n, found in claimed.items() for v in found if v.evidence == name]
        assert recorded == now, f"evidence/{name}.json: write its verdicts by `stillhouse evidence --verdicts`"


def test_bounds_of_recipes_are_in_the_unit_of_the_figure_and_no_shares_of_one() -> None:
    for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")):
        for claim in read_yaml(path).get("claims") or []:
            shown = quantity(claim["figure"])
            least = {"%": 1.0, "points": 0.4}.get(shown.unit, 0.0) if shown.scale == 100 else 0.0
            for key in ("at_least", "at_most"):
                bound = float(claim.get(key, 0))
                assert not 0 < abs(bound) < least, (
                    f"{path.name}: {key}: {bound} of '{claim['figure']}' means {bound} {shown.unit}"
                )
