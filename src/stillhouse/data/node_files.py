"""Files of graphs whose nodes are classified: Planetoid's raw files, npz in CPF's parts or plain, torch_geometric's
Data. None of them runs code."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.errors import MissingExtra, UserError

Read = tuple[Any, np.ndarray, np.ndarray, dict[str, np.ndarray]]


class _PlainPickle(pickle.Unpickler):
    """Reads arrays, scipy matrices and dictionaries from Planetoid's pickles, and refuses every other name in them."""

    def find_class(self, module: str, name: str) -> Any:
        import scipy.sparse

        allowed = {
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "csr_matrix": scipy.sparse.csr_matrix,
            "defaultdict": collections.defaultdict,
            "list": list,
        }
        if name == "_reconstruct":
            core: Any = getattr(np, "_core", None) or np.core  # before and from numpy 2
            return core.multiarray._reconstruct
        if name in allowed and module.split(".")[0] in ("numpy", "scipy", "collections", "__builtin__", "builtins"):
            return allowed[name]
        raise UserError(f"A Planetoid file holds {module}.{name}, which no such file has; it was not loaded.")


def read_planetoid(folder: Path) -> Read:
    """The raw files `ind.NAME.*` of a folder, with the public split. Test nodes that the files leave out have no
    features and the label -1."""
    import scipy.sparse

    found = sorted(folder.glob("ind.*.graph"))
    if len(found) != 1:
        raise UserError(
            f"{folder} must hold the raw files of one Planetoid graph (ind.NAME.x, …); it holds {len(found)} named "
            "ind.*.graph."
        )
    stem = found[0].name.removesuffix(".graph")

    def part(end: str) -> Any:
        with open(folder / f"{stem}.{end}", "rb") as file:
            return _PlainPickle(file, encoding="latin1").load()

    given = np.loadtxt(folder / f"{stem}.test.index", dtype=np.int64)
    allx, ally, tx, ty, y, graph = (part(e) for e in ("allx", "ally", "tx", "ty", "y", "graph"))
    n = max(len(graph), int(given.max()) + 1)
    order = np.concatenate([np.arange(allx.shape[0]), given])
    stacked = scipy.sparse.vstack([allx, tx]).tocoo()
    x = scipy.sparse.csr_matrix((stacked.data, (order[stacked.row], stacked.col)), (n, stacked.shape[1]))
    labels = np.full(n, -1)
    labels[order] = np.concatenate([ally, ty]).argmax(1)
    edges = np.array([(i, j) for i, others in graph.items() for j in others], dtype=np.int64).T
    return (
        x,
        labels,
        edges,
        {"train": np.arange(len(y)), "val": np.arange(len(y), len(y) + 500), "test": np.sort(given)},
    )


def read_npz(path: Path) -> Read:
    """An npz in CSR parts (`adj_*`, `attr_*`, `labels`) or with arrays `x`, `y`, `edge_index` and, where there are,
    `train`, `val`, `test`."""
    import scipy.sparse

    with np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        if {"x", "y", "edge_index"} <= names:
            masks = {k: file[m] for k in ("train", "val", "test") for m in (k, f"{k}_mask") if m in names}
            return file["x"], file["y"], file["edge_index"], masks
        if not {"adj_indices", "adj_indptr", "labels"} <= names:
            raise UserError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}; a graph is x, y, edge_index, or adj_*, "
                "attr_*, labels."
            )
        labels = file["labels"].astype(np.int64)
        adjacency = scipy.sparse.csr_matrix(
            (np.ones(len(file["adj_indices"])), file["adj_indices"], file["adj_indptr"]), (len(labels),) * 2
        ).tocoo()
        if "attr_data" in names:
            x: Any = scipy.sparse.csr_matrix(
                (file["attr_data"], file["attr_indices"], file["attr_indptr"]), tuple(file["attr_shape"])
            )
        else:
            x = file["attr_matrix"] if "attr_matrix" in names else np.zeros((len(labels), 0), np.float32)
    return x, labels, np.stack([adjacency.row, adjacency.col]), {}


def read_pyg(path: Path) -> Read:
    """A `torch_geometric.data.Data` saved by `torch.save`, or a data set's processed file; read without running code in
    it."""
    try:
        import torch_geometric.data as geometric
        from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
        from torch_geometric.data.storage import GlobalStorage
    except ImportError:
        raise MissingExtra("A pyg: graph", "graph") from None
    known = [geometric.Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]
    try:
        with torch.serialization.safe_globals(known):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than a torch_geometric Data of tensors; save Data(x, y, edge_index, train_mask, …) "
            "alone."
        ) from None
    held = held[0] if isinstance(held, tuple) and held else held
    return from_data(held, str(path))


def from_data(data: Any, name: str = "data") -> Read:
    """Features, labels, edges and masks of a PyG Data, or of a mapping with the same names."""
    get = data.get if isinstance(data, Mapping) else lambda k: getattr(data, k, None)
    if get("y") is None or get("edge_index") is None:
        raise UserError(f"{name}: a graph needs y and edge_index.")
    labels = np.asarray(get("y"))
    x = get("x") if get("x") is not None else np.zeros((len(labels), 0), np.float32)
    masks = {k: np.asarray(get(f"{k}_mask")) for k in ("train", "val", "test") if get(f"{k}_mask") is not None}
    return x, labels, np.asarray(get("edge_index")), {k: m[:, 0] if m.ndim == 2 else m for k, m in masks.items()}
