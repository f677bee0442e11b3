"""How chunks go to tables and salts, against the reference layer's configuration."""

from __future__ import annotations

import torch

from parity.case import Case
from stillhouse.methods.compression.unified_embedding.table import Feature, UnifiedEmbedding


def assignment(case: Case) -> None:
    p = case.params
    table = UnifiedEmbedding(
        [Feature(name, chunks) for name, chunks in p["features"]],
        p["buckets_per_table"],
        p["dim_per_table"],
        tables=p["num_tables"],
    )
    found = table.assignment
    case.close("feature_of_chunk", torch.tensor(found.feature))
    case.close("table_of_chunk", torch.tensor(found.table))
    case.close("salt_of_chunk", torch.tensor(found.salts))
    case.close("output_dims", torch.tensor(found.widths))
    case.close("total_parameters", torch.tensor(table.weight.numel()))
    # the reference joins a feature's chunks by their names, so 10 before 2; ours are in numeric order
    by_name = [k for _, chunks in p["features"] for k in sorted(range(chunks), key=str)]
    assert found.chunk == [k for _, chunks in p["features"] for k in range(chunks)]
    case.close("concat_order", torch.tensor(by_name))


ADAPTERS = {"assignment": assignment}
