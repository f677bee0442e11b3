"""`DynamicsStudy`: learning curves that were predicted and simulated, feature by feature; the product of JEPA bias."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stillhouse.methods.pretraining.jepa_bias import theory
from stillhouse.methods.pretraining.jepa_bias.theory import KINDS, Array, Kind
from stillhouse.runs.products import Product, read_meta


@dataclass
class DynamicsStudy(Product):
    """What was predicted and what was simulated, by kind of learner (`jepa`, `mae`).

    Attributes:
        names, lam, rho: of the d features.
        depth, scale, share: of the study.
        times: critical times (d,), infinite for what is never learned; ends: final gains of the encoder (d,).
        grid: (T,) times; predicted, simulated: gains of the encoder (T, d); simulated is empty where only the closed
            form was computed.
        encoders: A (d, d), by which coordinates x (n, d) become x @ A.T; the end of the simulation, or the fixed point.
        probes: curves of the non-linear case, by kind.
    """

    kind: ClassVar[str] = "stillhouse.methods.pretraining.jepa_bias:DynamicsStudy"
    names: list[str]
    lam: Array
    rho: Array
    depth: int
    scale: float
    share: float
    times: dict[str, Array]
    ends: dict[str, Array]
    grid: dict[str, Array]
    predicted: dict[str, Array]
    simulated: dict[str, Array]
    encoders: dict[str, Array]
    probes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def order(self, kind: Kind) -> list[int]:
        """The features in the order in which they are learned; those that never are, are left out."""
        return [int(i) for i in np.argsort(self.times[kind], kind="stable") if np.isfinite(self.times[kind][i])]

    def time_error(self, kind: Kind) -> float:
        """The largest relative error of the simulation's clock: the time at which the closed form reaches a simulated
        gain, over the simulation's.

        Taken where the layer scale has grown by a half and is not within a tenth of its end. Gains at a time are no
        measure: features switch on so suddenly that a clock off by 1e-5 looks like an error of 1.
        """
        grows = self.ends[kind] > 0
        w, t = self.simulated[kind][:, grows] ** (1 / self.depth), self.grid[kind][:, None]
        end = self.ends[kind][grows] ** (1 / self.depth)
        inside = (w > 1.5 * self.scale) & (w < 0.9 * end)
        safe = np.where(inside, w, (self.scale + end) / 2)
        expected = theory.reaching_time(safe, self.lam[grows], self.rho[grows], self.depth, self.scale, kind)
        return float(np.max(np.abs(expected / np.maximum(t, 1e-300) - 1)[inside], initial=0.0))

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"lam": self.lam, "rho": self.rho}
        for name in ("times", "ends", "grid", "predicted", "simulated", "encoders"):
            arrays |= {f"{name}.{k}": np.ascontiguousarray(v) for k, v in getattr(self, name).items()}
        save_file(arrays, str(folder / "study.safetensors"))
        meta = {
            "names": self.names,
            "depth": self.depth,
            "scale": self.scale,
            "share": self.share,
            "probes": self.probes,
        }
        (folder / "product.json").write_text(json.dumps({"kind": self.kind, "format": 1, **meta}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> DynamicsStudy:
        from safetensors.numpy import load_file

        meta, arrays = read_meta(folder), load_file(str(Path(folder) / "study.safetensors"))
        parts: dict[str, Any] = {
            name: {k: arrays[f"{name}.{k}"] for k in KINDS if f"{name}.{k}" in arrays}
            for name in ("times", "ends", "grid", "predicted", "simulated", "encoders")
        }
        return cls(
            meta["names"],
            arrays["lam"],
            arrays["rho"],
            meta["depth"],
            meta["scale"],
            meta["share"],
            **parts,
            probes=meta["probes"],
        )
