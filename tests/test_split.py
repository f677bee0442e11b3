"""How data sets are cut, whatever their samples are: splits without overlap, subsets, draws moved by the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.config.specs import DataSpec
from stillhouse.data.split import cut, in_balance, in_proportion
from stillhouse.errors import UserError

LABELS = np.arange(300) % 3


@pytest.mark.parametrize("draw", [in_proportion, in_balance])
@pytest.mark.parametrize("strata", [LABELS, np.zeros(300, np.int64)])
def test_the_parts_of_training_share_no_sample_and_leave_none_out(draw, strata):
    spec = DataSpec(name="any", val=0.1, holdout=0.25)
    parts = cut({"train": strata}, spec, 60, draw)
    assert {p.source for p in parts.values()} == {"train"}
    assert {n: len(p.rows) for n, p in parts.items()} == {"test": 60, "val": 24, "holdout": 60, "train": 156}
    assert np.array_equal(np.sort(np.concatenate([p.rows for p in parts.values()])), np.arange(300))
    again = cut({"train": strata}, spec, 60, draw)
    other = cut({"train": strata}, spec.model_copy(update={"seed": 1}), 60, draw)
    assert all(np.array_equal(p.rows, again[n].rows) for n, p in parts.items())
    assert not np.array_equal(parts["val"].rows, other["val"].rows)


def test_splits_of_the_source_stay_what_they_are():
    strata = {"train": LABELS, "val": LABELS[:30], "test": LABELS[:60]}
    parts = cut(strata, DataSpec(name="any", size=90, test_size=30, val=0.5), 60, in_proportion)
    assert {n: (p.source, len(p.rows)) for n, p in parts.items()} == {
        "train": ("train", 90),
        "val": ("val", 30),
        "test": ("test", 30),
    }
    assert np.bincount(LABELS[parts["train"].rows]).tolist() == [30, 30, 30]


def test_ordered_samples_give_their_last_for_testing():
    parts = cut({"train": LABELS}, DataSpec(name="any"), 30, in_balance, ordered=True)
    assert parts["test"].rows.tolist() == list(range(270, 300))


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (0, {}, "holds no training samples"),
        (1, {}, "one training sample is too few"),
        (40, {"val": 0.9, "holdout": 0.9}, "leave none of 20 samples for training"),
        (40, {"size": 21}, "data.size is 21, but the data set holds 20"),
    ],
)
def test_what_cannot_be_cut_is_refused(count, changes, message):
    with pytest.raises(UserError, match=message):
        cut({"train": np.zeros(count, np.int64)}, DataSpec(name="any", **changes), count / 2, in_proportion)
