"""How figures are shown to a reader: title, unit, digits, which way is better, and one sentence of what each means."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Quantity:
    """How one named figure is shown. `better` is 1 where higher is better, -1 where lower is, 0 where nothing is known."""

    title: str
    unit: str = ""
    scale: float = 1.0
    decimals: int | None = None  # None: three significant digits
    better: int = 0
    meaning: str = ""
    prefixes: bool = False  # thousands, millions or billions, whichever suits the largest value shown

    def suited_to(self, largest: float) -> Quantity:
        """The same figure in the unit that suits values up to `largest`: k, M or G before the unit, where it takes prefixes."""
        if not self.prefixes or not abs(largest) >= 1000:
            return self
        power = min(3, int(math.log10(abs(largest))) // 3)
        return replace(self, unit=" kMG"[power] + self.unit, scale=self.scale / 1000**power)

    @property
    def header(self) -> str:
        """Title with unit, for a column or an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def difference_unit(self) -> str:
        """The unit of a difference: percentage points for percent."""
        return "points" if self.unit == "%" else self.unit

    def digits(self, value: float, like: float | None = None) -> str:
        """The value in this unit, without the unit; an en dash for NaN. With `like`, to as many decimals as that value has."""
        x = value * self.scale
        if not math.isfinite(x):
            return "–" if math.isnan(x) else ("∞" if x > 0 else "−∞")
        measure = x if like is None else like * self.scale
        decimals = self.decimals
        if decimals is None:
            if 0 < abs(measure) < 1e-4:
                return f"{x:.2e}".replace("-", "−")
            decimals = 0 if measure == round(measure) else max(0, 2 - math.floor(math.log10(abs(measure))))
        return f"{x:,.{decimals}f}".replace("-", "−")

    def signed(self, value: float) -> str:
        """As `digits`, with a plus sign for what is not negative."""
        text = self.digits(value)
        return text if math.isnan(value) or text.startswith("−") else f"+{text}"

    def text(self, value: float) -> str:
        """The value with its unit."""
        return "–" if math.isnan(value) else f"{self.digits(value)} {self.unit}".strip()


_KNOWN = {
    "accuracy": Quantity("Accuracy", "%", 100, 2, 1, "Share of test samples whose most probable class is the right one."),
    "accuracy_top5": Quantity("Top-5 accuracy", "%", 100, 2, 1, "Share of test samples whose right class is among the five most probable."),
    "nll": Quantity("NLL", "nats", 1, 3, -1, "Negative log-likelihood: how surprised the model is by the right class, on average; lower is better."),
    "accuracy_omitted": Quantity("Accuracy, omitted", "%", 100, 2, 1, "Share right among test samples of the classes that the student never saw."),
    "accuracy_seen": Quantity("Accuracy, seen", "%", 100, 2, 1, "Share right among test samples of the classes that the student was taught."),
    "auc": Quantity("AUC", "%", 100, 2, 1, "Area under the ROC curve: how often a positive is ranked above a negative."),
    "nmi": Quantity("NMI", "%", 100, 2, 1, "Normalised mutual information of clusters and classes."),
    "ari": Quantity("ARI", "%", 100, 2, 1, "Adjusted Rand index of clusters and classes; 0 is chance."),
    "perplexity": Quantity(
        "Perplexity", "", 1, 2, -1, "Of tokens: as if the model chose among so many equally likely ones each time; e to the power of the NLL."
    ),
    "ece": Quantity(
        "ECE", "%", 100, 2, -1, "Expected calibration error: how far the model's confidence is from its accuracy; 0 is as sure as it is right."
    ),
    "brier": Quantity("Brier", "", 1, 3, -1, "Brier score: squared distance of the probabilities from the right answer, 0 to 2; lower is better."),
    "aurc": Quantity(
        "AURC", "×10⁻³", 1000, 1, -1, "Error rate when the least confident answers are withheld, averaged over how many are; lower is better."
    ),
    "step_relative": Quantity(
        "Step",
        "×",
        1,
        2,
        -1,
        "Time of a training step (CPU time on a CPU; without the optimiser), as a multiple of the reference's in the same group.",
    ),
    "step_memory_relative": Quantity(
        "Step memory", "×", 1, 2, -1, "The most that a training step holds beyond what was held before, as a multiple of the reference's."
    ),
    "parameters": Quantity("Parameters", "", 1, None, -1, "Numbers that the model holds.", prefixes=True),
    "multiply_adds": Quantity(
        "Multiply-adds", "", 1, None, -1, "Multiplications with addition for one sample: the work of one prediction.", prefixes=True
    ),
    "latency_ms": Quantity("Latency", "ms", 1, None, -1, "Median time of one prediction, one sample at a time (one CPU thread, or the GPU)."),
    "file_bytes": Quantity("File size", "B", 1, None, -1, "What the saved product takes on disk, in bytes.", prefixes=True),
    "step_ms": Quantity("Step time", "ms", 1, None, -1, "Time of a training step (CPU time on a CPU; without the optimiser)."),
    "step_ratio": Quantity(
        "Step / plain", "×", 1, 2, -1, "Time of a training step over a plain cross-entropy step of the same student, taken in turns."
    ),
    "step_bytes": Quantity(
        "Step memory", "B", 1, None, -1, "The most that torch holds at a time in a training step, beyond what it held before.", True
    ),
    "train_seconds": Quantity("Training time", "s", 1, None, -1, "Wall-clock time of the training."),
    "run_seconds": Quantity(
        "Whole run", "s", 1, None, -1, "Wall-clock time of the whole run, with its teacher's training where that was not already there."
    ),
}


def quantity(name: str, largest: float = 0.0) -> Quantity:
    """How the figure of this name is shown, in a unit for values up to `largest`; `val/accuracy` as `accuracy`; an unknown name as itself, to three digits."""
    base = name.rsplit("/", 1)[-1]
    return _KNOWN.get(base, Quantity(base.replace("_", " ").capitalize())).suited_to(largest)


def in_reading_order(names: set[str]) -> list[str]:
    """Known figures in their usual order (quality, calibration, cost), then the others by name."""
    known = list(_KNOWN)
    return sorted(names, key=lambda n: (known.index(n) if n in _KNOWN else len(known), n))
