"""Reports: their numbers worked out by hand, and pages that are whole, safe and readable without a network."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.offline import get_plotlyjs
from rich.console import Console

from stillhouse.errors import UserError
from stillhouse.evaluation.quantities import quantity
from stillhouse.evaluation.statistics import paired_difference
from stillhouse.reporting.comparison import comparison_markdown, comparison_table, write_comparison_report
from stillhouse.reporting.rows import compare
from stillhouse.reporting.run_report import read_curves, write_run_report
from stillhouse.synthetic.product import SyntheticSet, contact_sheet

RESULTS = {
    "slug": "kd",
    "title": "KD on digits",
    "baseline": "CE",
    "command": "stillhouse bench recipes/classification/kd.yaml",
    "versions": {"torch": "2.15.0"},
    "created": "2025-11-20",
    "device": "cpu",
    "rows": [
        {
            "label": "CE",
            "recipe": "kd.yaml",
            "variant": "ce",
            "seeds": [0, 1, 2],
            "metrics": {
                "accuracy": [0.70, 0.72, 0.71],
                "ece": [0.1, 0.11, 0.12],
                "parameters": [272474] * 3,
                "train_seconds": [10, 11, 12],
            },
        },
        {
            "label": "KD",
            "recipe": "kd.yaml",
            "variant": None,
            "seeds": [0, 1, 2],
            "metrics": {
                "accuracy": [0.72, 0.75, 0.72],
                "ece": [0.05, 0.04, 0.06],
                "parameters": [272474] * 3,
                "train_seconds": [13, 14, 15],
            },
        },
    ],
    "teacher": {"label": "big", "metrics": {"accuracy": 0.8, "parameters": 1e6, "ece": None}},
}


def results(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RESULTS), **changes}


def html_of(path: Path) -> str:
    """The page without plotly's own script, which must be there once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


def test_markdown_holds_mean_spread_and_paired_gain():
    text = comparison_markdown(RESULTS)
    gain = paired_difference([72, 75, 72], [70, 72, 71])
    assert "| Method | Accuracy (%) | Gain over CE (points) | ECE (%) | Parameters (M) | Training time (s) |" in text
    assert "| CE | 71.00 ± 1.00 | baseline | 11.00 ± 1.00 | 0.272 | 11 ± 1 |" in text
    assert f"| KD | 73.00 ± 1.73 | +2.00 [{gain.low:.2f}, +{gain.high:.2f}] |".replace("[-", "[−") in text
    assert "| big (teacher) | 80.00 | – | – | 1 | – |" in text
    assert "over 3 seeds" in text
    assert "paired by seed" in text
    assert "95 % t interval" in text


def test_the_terminal_shows_the_gain_calibration_and_cost():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison_table(RESULTS))
    text = console.export_text()
    assert "73.00 ± 1.73" in text
    assert "Gain over CE" in text and "(points)" in text
    assert "ECE" in text and "Params" in text


def test_seeds_are_paired_by_number_and_failed_ones_left_out():
    rows = copy.deepcopy(RESULTS["rows"])
    rows[1].update(seeds=[2, 0, 5, 1], metrics={"accuracy": [0.72, 0.72, 0.99, None]})
    row = compare(results(rows=rows)).rows[1]
    assert row.gain == paired_difference([0.72, 0.72], [0.71, 0.70])
    assert row.values("accuracy") == [0.72, 0.72, 0.99]


def test_a_gain_is_positive_where_lower_is_better():
    gain = compare(results(primary="ece")).rows[1].gain
    assert gain.mean == pytest.approx(0.06)


def test_one_seed_is_said_to_prove_little():
    rows = [{**r, "seeds": [0], "metrics": {"accuracy": r["metrics"]["accuracy"][:1]}} for r in RESULTS["rows"]]
    text = comparison_markdown(results(rows=rows, teacher=None))
    assert "| KD | 72.00 | +2.00 |" in text
    assert "One seed for each method" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": []}, "no rows"),
        ({"baseline": "ce"}, "no row for the baseline 'ce'"),
        ({"primary": "acuracy"}, "did you mean 'accuracy'"),
        (
            {"rows": [{"label": "CE", "seeds": [0, 1], "metrics": {"accuracy": [0.5]}}]},
            "'accuracy' has 1 values for 2 seeds",
        ),
        ({"rows": [{"label": "CE", "seeds": [0], "metrics": {"accuracy": [None]}}]}, "no figure"),
    ],
)
def test_results_that_cannot_be_compared_get_a_sentence(changes: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        compare(results(**changes))


def test_a_comparison_report_has_its_table_and_plots_and_needs_no_network(tmp_path: Path):
    path = write_comparison_report(RESULTS, tmp_path / "deep" / "comparison.html")
    html = html_of(path)
    for name in ("dots-accuracy", "cost-parameters", "cost-train_seconds", "dots-ece"):
        assert html.count(f'id="{name}"') == 1
    order = re.search(r'<td data-order="([\d.]+)">71.00 ± 1.00</td>', html)
    assert float(order[1]) == pytest.approx(0.71)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", html)
    assert [p.name for p in path.parent.iterdir()] == ["comparison.html"]


def test_names_are_shown_as_they_are_never_run(tmp_path: Path):
    evil = "</script><script>alert(1)</script><b>KD</b>"
    rows = copy.deepcopy(RESULTS["rows"])
    rows[1]["label"] = evil
    html = html_of(
        write_comparison_report(results(rows=rows, title=evil, command=evil, device=evil), tmp_path / "c.html")
    )
    assert "<script>alert" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_figures_of_other_tasks_are_compared_by_what_there_is(tmp_path: Path):
    rows = [{"label": f"m{i}", "seeds": [0, 1], "metrics": {"bleu": [0.1 * i, 0.1 * i + 0.02]}} for i in range(12)]
    path = write_comparison_report({"slug": "x", "rows": rows}, tmp_path / "c.html")
    assert 'id="dots-bleu"' in html_of(path)
    assert "| m3 | 0.310 ± 0.014 |" in comparison_markdown({"rows": rows})


def write_run(folder: Path) -> Path:
    (folder / "product").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "name: small <run>\nmethod: distillation\nseed: 3\nstudent: {model: stillhouse:resnet20}\n", encoding="utf-8"
    )
    (folder / "environment.json").write_text(
        json.dumps(
            {
                "versions": {"torch": "2.15.0"},
                "seed": 3,
                "command": ["stillhouse", "run", "a b.yaml"],
                "teachers": {"big": {"model": "hf:x", "nll": 0.5}},
            }
        )
    )
    (folder / "evaluation.json").write_text(
        json.dumps({"accuracy": 0.7012, "parameters": 272474, "peer": {"accuracy": 0.5}})
    )
    (folder / "product" / "product.json").write_text(json.dumps({"kind": "student"}))
    (folder / "metrics.csv").write_text(
        "stage,epoch,step,loss,ce,kd,lr,val/accuracy\n"
        "teacher,0,0,2.5,2.5,,0.1,\nteacher,0,10,2.0,2.0,,0.05,\n"
        "student,0,0,3.0,2.0,1.0,0.1,\nstudent,0,10,2.0,1.5,0.5,0.05,\nstudent,0,10,,,,,0.61\nstudent,1,20,1.",
        encoding="utf-8",
    )
    return folder


def test_a_run_report_has_results_curves_recipe_and_versions(tmp_path: Path):
    path = write_run_report(write_run(tmp_path / "run"))
    html = html_of(path)
    assert path == tmp_path / "run" / "report.html"
    assert "70.12 %" in html
    assert "Accuracy (peer)" in html
    assert "Teacher: big" in html
    assert "hf:x" in html
    assert "0.500 nats" in html
    assert "Training: teacher" in html
    assert "Training: student" in html
    assert len(re.findall(r'id="(loss|figure)-\d', html)) == 5  # teacher: losses, lr; student: losses, lr, accuracy
    assert "<title>small &lt;run&gt;</title>" in html
    assert "stillhouse run &#x27;a b.yaml&#x27;" in html
    assert not list((tmp_path / "run").glob("*.partial"))


def test_curves_skip_empty_cells_and_survive_a_torn_last_line(tmp_path: Path):
    curves = read_curves(write_run(tmp_path / "run") / "metrics.csv")
    assert curves["teacher"]["ce"] == ([0, 10], [2.5, 2.0])
    assert "kd" not in curves["teacher"]
    assert curves["student"]["val/accuracy"] == ([10], [0.61])
    assert curves["student"]["kd"] == ([0, 10], [1.0, 0.5])


def test_long_curves_are_thinned_but_end_where_they_end(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("stage,epoch,step,loss\n" + "".join(f"fit,0,{i},{i}\n" for i in range(10_001)), encoding="utf-8")
    xs, ys = read_curves(path)["fit"]["loss"]
    assert len(xs) <= 2002
    assert (xs[0], xs[-1], ys[-1]) == (0, 10_000, 10_000)


def test_a_run_that_has_only_begun_is_reported_without_what_is_missing(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: just begun\n", encoding="utf-8")
    html = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "just begun" in html
    assert "Results" not in html
    assert len(html) < 20_000  # no figure, no plotly


def test_a_folder_without_a_run_or_with_a_broken_file_gets_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="no run in"):
        write_run_report(tmp_path / "nothing")
    (tmp_path / "evaluation.json").write_text('{"accuracy": 0.')
    with pytest.raises(UserError, match=r"evaluation.json is not valid JSON"):
        write_run_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.7234, "72.34 %"),
        ("val/accuracy", 0.5, "50.00 %"),
        ("parameters", 11_689_512, "11.7 M"),
        ("parameters", 1210, "1.21 k"),
        ("parameters", 999, "999"),
        ("multiply_adds", 4.1e9, "4.10 G"),
        ("file_bytes", 1_100_000, "1.10 MB"),
        ("latency_ms", 132.4, "132 ms"),
        ("nll", float("nan"), "–"),
        ("my_score", -0.01234, "−0.0123"),
        ("my_score", 0.0, "0"),
        ("my_score", 3e-7, "3.00e−07"),
    ],
)
def test_figures_are_shown_in_the_unit_a_reader_expects(name: str, value: float, text: str):
    assert quantity(name, value).text(value) == text


def test_the_report_of_a_synthetic_set_shows_its_images_what_they_teach_and_what_they_cost(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    classes = [f"kind{i}" for i in range(3)]
    made = SyntheticSet(
        torch.randn(6, 3, 8, 8),
        torch.arange(3).repeat_interleave(2),
        classes,
        (0.5,) * 3,
        (0.2,) * 3,
        made_by={"method": "dm"},
    )
    made.save(folder / "product")
    figures = {
        "accuracy": 0.4,
        "accuracy_std": 0.02,
        "accuracy_ResNet18": 0.25,
        "distil_seconds": 7.0,
        "distil_peak_mb": 24.0,
        "stored_images": 6.0,
    }
    (folder / "evaluation.json").write_text(
        json.dumps({**figures, "stored_mb": made.bytes / 1e6, "label_agreement": 0.9})
    )
    html = html_of(write_run_report(folder))
    sheet = re.search(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(sheet[1]) == (folder / "product" / "sheet.png").read_bytes()
    assert "kind0, kind1, kind2. Pixels out of range are shown clipped" in html and "made_by" not in html
    results, cost = html.index("<h2>Results"), html.index("<h2>Cost")
    assert results < html.index("2.00 points") < html.index("Accuracy, ResNet18") < html.index("25.00 %") < cost
    assert cost < html.index("7 s") and "24 MB" in html and "4.66 kB" in html and "Label agreement" in html


def test_a_contact_sheet_has_a_row_a_class_and_stays_small():
    def sheet(count: int, each: int, side: int) -> torch.Size:
        return contact_sheet(torch.rand(count * each, 3, side, side), torch.arange(count).repeat_interleave(each)).shape

    assert sheet(3, 2, 32) == (3, 3 * 66 + 2, 2 * 66 + 2)
    assert sheet(20, 1, 8) == (3, 2 * 66 + 2, 10 * 66 + 2), "one image a class: ten classes a row"
    assert sheet(200, 2, 64) == (3, 100 * 50 + 2, 2 * 50 + 2), "the first hundred classes, made small"


def test_a_report_opens_with_what_the_student_is_worth(tmp_path: Path) -> None:
    from stillhouse.runs.execution import execute
    from stillhouse.runs.recipe import validate

    teacher = {"model": "stillhouse:mlp", "options": {"widths": [64]}, "train": {"epochs": 1}}
    tree = {"data": {"name": "digits", "size": 200}, "teacher": teacher, "student": "stillhouse:mlp"}
    execute(validate({**tree, "objectives": ["ce", "kd"], "train": {"epochs": 1}}), tmp_path / "run", cpu=True)
    html = (tmp_path / "run" / "report.html").read_text()
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["teachers"]["teacher"]
    assert facts["model"] == "stillhouse:mlp" and facts["parameters"] == 65 * 64 + 65 * 10
    # how fast it is depends on the machine's moment
    assert re.search(r"The student is [\d.]+ times larger.{0,30} than the teacher, at [\d.]+ points", html)


def test_the_headline_of_a_comparison_says_how_sure_it_is() -> None:
    from stillhouse.reporting.comparison import compare, headline

    def row(label: str, values: list[float], size: int) -> dict[str, Any]:
        metrics = {"accuracy": values, "parameters": [size] * len(values)}
        return {"label": label, "seeds": list(range(len(values))), "metrics": metrics}

    teacher = {"label": "teacher", "metrics": {"accuracy": [0.95], "parameters": [500]}}
    rows = [row("kd", [0.91, 0.94, 0.91], 100), row("alone", [0.90, 0.91, 0.905], 100)]
    told = headline(compare({"rows": rows, "baseline": "alone", "teacher": teacher}))
    assert told.startswith("kd: 5.0 times smaller than the teacher, at 3.00 points less; +1.50 points over alone")
    assert "not certain with 3 seeds" in told
    rows[0] = row("kd", [0.92, 0.93, 0.925], 100)
    assert ", certain with 3 seeds" in headline(compare({"rows": rows, "baseline": "alone"}))
    assert "may be chance" in headline(
        compare({"rows": [row("kd", [0.9], 1), row("alone", [0.8], 1)], "baseline": "alone"})
    )
