"""The information term and the centroids of MCMI against the arrays of `mcmi`."""

from __future__ import annotations

from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.classification.mcmi import (
    OutputStatistics,
    conditional_information,
    mcmi_loss,
    updated_centroids,
)


def loss(case: Case) -> None:
    logits, labels, centroids = case.leaf("logits"), case["labels"], case["centroids"]
    value = mcmi_loss(logits, labels, centroids, case.params["lam"])
    value.backward()
    case.close("ce", F.cross_entropy(logits, labels))
    case.close("cmi", conditional_information(logits, labels, centroids))
    case.close("loss", value)
    case.close_grad("logits")


def centroids_epoch(case: Case) -> None:
    logits = F.linear(case["x"], case["w:weight"], case["w:bias"])
    seen = OutputStatistics(case.params["num_classes"])
    for rows, labels in zip(logits.split(case.params["batch_size"]), case["labels"].split(case.params["batch_size"])):
        seen.add(rows, labels)
    case.close("centroids", seen.centroids())
    case.close("cmi", seen.information())


def centroids_batch(case: Case) -> None:
    logits = case["logits_per_class"]
    assert logits.shape[1] == case.params["samples_per_class"]
    case.close("centroids_after", updated_centroids(case["centroids_before"], logits, case.params["decay"]))


ADAPTERS = {"loss": loss, "centroids_epoch": centroids_epoch, "centroids_batch": centroids_batch}
