"""How codes are judged: k-means against the classes, classifiers on top, and how much of c can be read off s."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Codes = Mapping[str, np.ndarray]


def cluster_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """The share of samples in the right cluster under the best one-to-one matching of clusters and classes (Hungarian);
    (N,) ids twice."""
    from scipy.optimize import linear_sum_assignment

    size = int(max(labels.max(), clusters.max())) + 1
    table = np.zeros((size, size), dtype=np.int64)
    np.add.at(table, (clusters, labels), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(labels))


def clustering(codes: np.ndarray, labels: np.ndarray, seed: int, repeats: int = 1) -> dict[str, float]:
    """`cluster_acc`, `nmi` and `ari` of k-means (10 restarts, as many clusters as classes) on codes (N, D), means over
    repetitions."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = [
        KMeans(len(np.unique(labels)), n_init=10, random_state=seed + r).fit_predict(codes) for r in range(repeats)
    ]
    return {
        "cluster_acc": float(np.mean([cluster_accuracy(labels, f) for f in found])),
        "nmi": float(np.mean([normalized_mutual_info_score(labels, f) for f in found])),
        "ari": float(np.mean([adjusted_rand_score(labels, f) for f in found])),
    }


def classification(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, float]:
    """Test accuracy of an SVM (RBF) and of a linear probe (logistic regression on standardised codes)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {
        "svm": float(SVC(kernel="rbf").fit(train, train_labels).score(test, test_labels)),
        "probe": float(probe.fit(train, train_labels).score(test, test_labels)),
    }


def redundancy(
    s: np.ndarray, c: np.ndarray, s_test: np.ndarray, c_test: np.ndarray, most: int = 2000
) -> dict[str, float]:
    """R^2 on test data of a regression from s to c, linear ridge and RBF kernel ridge (fitted on the first `most`
    samples), mean over c's dimensions."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    center, spread = s.mean(0), s.std(0) + 1e-8
    s, s_test, c = (s[:most] - center) / spread, (s_test - center) / spread, c[:most]
    level = c.mean(0)
    out = {}
    for name, model in (("linear", Ridge(1.0)), ("kernel", KernelRidge(kernel="rbf", alpha=0.1, gamma=1 / s.shape[1]))):
        out[f"redundancy_{name}"] = float(r2_score(c_test, model.fit(s, c - level).predict(s_test) + level))
    return out
