"""VQGraph: a graph network learns a codebook of local structures, and a perceptron learns which code, and which class,
each node has.

paper: VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs
venue: ICLR 2024
arxiv: 2308.02117
task: node classification
family: GNN-to-MLP distillation
use when: a graph network is accurate but its neighbours are too slow to fetch, and soft labels of a few classes carry
too little of the structure
needs: node features, edges at training time, labels of a few nodes, validation labels

Tokenizer: GCN, cosine codebook moved by running means (decay 0.8, commitment 0.25), reconstruction of edges and
embeddings, classes. Student: lamb CE + (1 - lamb) KL of soft labels + lamb_tok T^2
KL(softmax(S / T) || softmax(s / T)), S the tokenizer's cosines with all codes, s the negative distances of the
student's code vector (`student_scores: cosine` for cosines on both sides). Where the released code errs, its
intention is followed: the token term is a KL (the code hands probabilities to a function of logarithms), its targets
belong to the same nodes (the code's are permuted), the epoch is chosen by validation (`test_selected` is what the code
would report), and one step takes all three terms (the code makes three passes an epoch). `edge_sample` draws nodes for
the edge term, whose exact form needs N x N; null is exact. `fan_out` trains the tokenizer on neighbours drawn around
`batch` training nodes, as the code's SAGE variant does. With `lamb_tok: 0` it is GLNN with the tokenizer as its
teacher, with `lamb: 1` as well the plain MLP. Normalisation layers and replacement of dead codes, off in the code, are
not offered.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import LRSchedule, OptimizerSpec, Spec, TrainSpec
from stillhouse.data.node_graphs import NodeGraph
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.precision import full_precision
from stillhouse.methods.graphs.glnn import (
    NodeConfig,
    NodeTrain,
    described,
    fit_nodes,
    graph_of,
    new_student,
    node_student,
    soft_label_loss,
    test_figures,
)
from stillhouse.models.graph import NeighbourSampler, NodeMLP, convolutions, linear, propagation
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating

ROWS = 1 << 16
SCORES_IN_MEMORY = (
    1 << 28
)  # entries of S that are stored; of a larger S, a batch's rows are computed when they are needed


@full_precision
def token_loss(
    vectors: Tensor, codes: Tensor, teacher_scores: Tensor, temperature: float = 4.0, scores: str = "euclidean"
) -> Tensor:
    """T^2 KL(softmax(S / T) || softmax(s / T)), sum over codes, mean over nodes: a scalar.

    Args:
        vectors: the student's, (B, D). codes: (M, D). teacher_scores: S, (B, M).
        scores: how s is computed from vectors and codes: euclidean, -|v - e|, or cosine.

    Raises:
        UserError: shapes that do not fit, a temperature not above 0.
    """
    checks.options("vqgraph", positive={"temperature": temperature})
    if vectors.shape[-1] != codes.shape[-1] or teacher_scores.shape != (len(vectors), len(codes)):
        raise UserError(
            f"vqgraph: student vectors {tuple(vectors.shape)}, codes {tuple(codes.shape)} and teacher scores "
            f"{tuple(teacher_scores.shape)} do not fit; "
            "expected (B, D), (M, D) and (B, M)."
        )
    given = (
        F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).t()
        if scores == "cosine"
        else -distances(vectors, codes)
    )
    target, log_q = F.log_softmax(teacher_scores / temperature, -1), F.log_softmax(given / temperature, -1)
    return temperature**2 * F.kl_div(log_q, target, reduction="batchmean", log_target=True)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of rows (B, D) and (M, D): (B, M), with a finite gradient where they are equal."""
    squared = x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * x @ y.t()
    return squared.clamp_min(1e-12).sqrt()


@full_precision
def node_loss(embedding: Tensor, decoded: Tensor) -> Tensor:
    """mean((h - z)^2) over N * D entries, with gradient on both sides: a scalar."""
    return F.mse_loss(embedding, decoded)


@full_precision
def edge_loss(decoded: Tensor, edges: Tensor, sample: int | None = None) -> Tensor:
    """sqrt(mean((A - P)^2)) with P = z z^T, scaled over the whole matrix to [0, 1], and A with ones on its diagonal: a
    scalar.

    Args:
        decoded: z, (N, D). edges: (2, E), both directions, without self loops.
        sample: take so many nodes, drawn at each call, and the edges among them: time and memory then grow with E and
            sample^2 rather than N^2.

    Raises:
        UserError: fewer than two nodes.
    """
    n = len(decoded)
    if n < 2:
        raise UserError(f"vqgraph: reconstructing edges needs at least two nodes; given: {n}.")
    if sample is not None and sample < n:
        nodes = torch.randperm(n)[:sample].to(edges.device)
        number = torch.full((n,), -1, device=edges.device)
        number[nodes] = torch.arange(sample, device=edges.device)
        edges = number[edges]
        edges, decoded, n = edges[:, (edges >= 0).all(0)], decoded[nodes], sample
    adjacency = torch.eye(n, dtype=decoded.dtype, device=decoded.device)
    adjacency[edges[0], edges[1]] = 1.0
    p = decoded @ decoded.t()
    low, high = p.min(), p.max()
    return ((p - low) / (high - low).clamp_min(1e-12) - adjacency).square().mean().clamp_min(1e-24).sqrt()


class Codebook(nn.Module):
    """Codes in the space of the embeddings, found by cosine and moved by running means; buffers, not parameters.

    Args:
        codes: M, at least 2. dim: D. decay: of the running means. commitment: weight of the pull of embeddings to their
            codes.
    """

    codes: Tensor
    cluster_size: Tensor

    def __init__(self, codes: int, dim: int, decay: float = 0.8, commitment: float = 0.25) -> None:
        super().__init__()
        if codes < 2:
            raise UserError(f"vqgraph: a codebook needs at least 2 codes; given: {codes}.")
        self.decay, self.commitment = decay, commitment
        first = torch.empty(codes, dim)
        nn.init.kaiming_uniform_(first)
        self.register_buffer("codes", F.normalize(first, dim=-1))
        self.register_buffer("cluster_size", torch.zeros(codes))

    def scores(self, x: Tensor) -> Tensor:
        """Cosine of embeddings (N, D) with every code: (N, M)."""
        return F.normalize(x, dim=-1) @ F.normalize(self.codes, dim=-1).t()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes of embeddings (N, D).

        Returns:
            (N, D) codes, through which the gradient of `x` passes unchanged; (N,) their indices; the commitment loss, 0
            in evaluation mode; and the codebook (M, D) that was read, before training moved it.
        """
        with torch.no_grad():
            index = torch.cat([self.scores(rows).argmax(-1) for rows in x.split(ROWS)])  # never all of (N, M) at once
        read = self.codes
        quantized = read[index]
        if not self.training:
            return quantized, index, x.new_zeros(()), read
        loss = self.commitment * F.mse_loss(x, quantized.detach())
        self._move(x.detach(), index)
        return x + (quantized - x).detach(), index, loss, read

    def _move(self, x: Tensor, index: Tensor) -> None:
        """Move each used code towards the mean direction of its embeddings (the unused stay, normalised)."""
        count = torch.bincount(index, minlength=len(self.codes)).to(x.dtype)
        total = torch.zeros_like(self.codes).index_add(0, index, F.normalize(x, dim=-1))
        mean = torch.where(
            count[:, None] > 0,
            F.normalize(total / count.clamp_min(1)[:, None], dim=-1),
            F.normalize(self.codes, dim=-1),
        )
        self.cluster_size.lerp_(count, 1 - self.decay)
        self.codes = torch.lerp(self.codes, mean, 1 - self.decay)


class _OfCodes(torch.autograd.Function):
    """`linear(x + stopgrad(codes[index] - x))` with the product taken over the codes in use rather than over all
    nodes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        used, inverse = torch.unique(index, return_inverse=True)
        table = codes[used]
        ctx.save_for_backward(table, inverse, weight)
        return F.linear(table, weight, bias)[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, inverse, weight = ctx.saved_tensors
        (grad,) = grads
        summed = torch.zeros(len(table), grad.shape[1], dtype=grad.dtype, device=grad.device).index_add(
            0, inverse, grad
        )
        return grad @ weight, None, None, summed.t() @ table, summed.sum(0)


class Tokenizer(nn.Module):
    """Two graph convolutions with a codebook between them.

    Args:
        inputs: D, of the features and of the codes. width: of the second convolution. classes: C. codes: M.
        dropout: after the first convolution.
        by_code: take the decoders' products over the codes in use rather than over all nodes: a third of the work, and
            the same up to rounding. Rounding decides which of the nodes of one code the largest and smallest entries of
            P, and so their gradients, belong to; the released code leaves it so.
    """

    def __init__(
        self, inputs: int, width: int, classes: int, codes: int, dropout: float = 0.8, by_code: bool = True
    ) -> None:
        super().__init__()
        geometric = convolutions()
        self.encode = geometric.GCNConv(inputs, inputs, normalize=False, add_self_loops=False)
        self.codebook = Codebook(codes, inputs)
        self.to_edges, self.to_nodes = nn.Linear(inputs, inputs), nn.Linear(inputs, inputs)
        self.classify = geometric.GCNConv(inputs, width, normalize=False, add_self_loops=False)
        self.fc = nn.Linear(width, classes)
        self.dropout, self.by_code = dropout, by_code

    def embed(self, x: Tensor, along: Tensor) -> Tensor:
        """(N, D) features to (N, D) embeddings, before the codebook."""
        return F.dropout(F.relu(self.encode(x, along)), self.dropout, self.training)

    def forward(self, x: Tensor, along: Tensor) -> dict[str, Tensor]:
        """(N, D) features and `along`, D^-1/2 (A + I) D^-1/2, to `logits` (N, C), `embedding`, `quantized`, `to_edges`,
        `to_nodes` (N, D), `hidden` (N, width), `index` (N,) and `commitment`."""
        return self.decode(self.embed(x, along), along)

    def decode(self, h: Tensor, along: Tensor) -> dict[str, Tensor]:
        """What `forward` gives, from embeddings (N, D)."""
        quantized, index, commitment, read = self.codebook(h)
        decoders = (self.to_edges, self.to_nodes)
        z_edges, z_nodes = (
            _OfCodes.apply(h, read, index, d.weight, d.bias) if self.by_code else d(quantized) for d in decoders
        )
        hidden = F.relu(self.classify(z_edges, along))
        return {
            "logits": linear(self.fc, hidden),
            "embedding": h,
            "quantized": quantized,
            "to_edges": z_edges,
            "to_nodes": z_nodes,
            "hidden": hidden,
            "index": index,
            "commitment": commitment,
        }

    @staticmethod
    def propagation(edges: Tensor, nodes: int) -> Tensor:
        """`along` for edges (2, E), both directions, without self loops."""
        return propagation(edges, nodes, "gcn")

    def losses(
        self, out: dict[str, Tensor], edges: Tensor, edge_weight: float, node_weight: float, sample: int | None = None
    ) -> dict[str, Tensor]:
        """The reconstruction and commitment terms of an output on a graph's edges; `sample`: of so many nodes for the
        edge term."""
        return {
            "nodes": node_weight * node_loss(out["embedding"], out["to_nodes"]),
            "edges": edge_weight * edge_loss(out["to_edges"], edges, sample),
            "commitment": out["commitment"],
        }


class TokenizerSpec(Spec):
    """The teacher: a graph network with a codebook."""

    codes: int = Field(512, ge=2, description="M; larger graphs want more.")
    width: int = Field(64, ge=1, description="Of the second convolution.")
    dropout: float = Field(0.5, ge=0, lt=1)
    edge_weight: float = Field(0.03, ge=0)
    node_weight: float = Field(0.001, ge=0)
    edge_sample: int | None = Field(
        700, ge=2, description="Nodes drawn at each step for the edge term; null: all, exact, N x N."
    )
    fan_out: list[int] | None = Field(
        None, description="Train on so many drawn neighbours a hop around training nodes, such as [5, 5]; default: all."
    )
    batch: int = Field(512, ge=1, description="fan_out: training nodes drawn for a step.")
    seed: int | None = Field(None, description="Of the tokenizer's training; default: the run's.")
    train: NodeTrain = Field(
        default_factory=lambda: NodeTrain(epochs=100, optimizer=OptimizerSpec(name="adam", lr=2e-3, weight_decay=1e-3))
    )


class BatchTrain(TrainSpec):
    """How the student is trained, on batches of nodes."""

    epochs: int = Field(500, ge=1, description="Passes over the nodes, at most.")
    batch_size: int = Field(512, ge=1, description="Nodes of a step; the rest of an epoch is dropped.")
    optimizer: OptimizerSpec = Field(
        default_factory=lambda: OptimizerSpec(name="adam", lr=0.01, weight_decay=5e-4), description="Default: Adam."
    )
    schedule: LRSchedule = Field(default_factory=lambda: LRSchedule(name="constant"), description="Default: constant.")
    best: Literal["accuracy"] | None = Field(
        "accuracy", description="Keep the weights of the best validation accuracy; of equals, the last."
    )
    patience: int | None = Field(50, ge=1, description="Stop after so many epochs that were below the best.")


class Config(NodeConfig):
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec)
    train: BatchTrain = Field(default_factory=BatchTrain)
    temperature: float = Field(4.0, gt=0, description="T of the token term.")
    lamb: float = Field(0.0, ge=0, le=1, description="Weight of the labels; the soft labels have 1 - lamb.")
    lamb_tok: float = Field(0.1, ge=0, description="Weight of the token term; the released code's 1e-8 turns it off.")
    student_scores: Literal["euclidean", "cosine"] = "euclidean"


class TokenStudent(nn.Module):
    """The perceptron, and a linear map from its last hidden layer to code space, which training alone needs."""

    def __init__(self, mlp: NodeMLP, dim: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.to_code = nn.Linear(mlp.fc.in_features, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) features to (B, C) logits and (B, D) code vectors."""
        h = self.mlp.embed(x)
        return linear(self.mlp.fc, h), linear(self.to_code, h)


class Tokens:
    """The tokenizer's outputs for the nodes seen in training: logits, codes, and cosines with all codes."""

    def __init__(self, tokenizer: Tokenizer, graph: NodeGraph) -> None:
        with evaluating(tokenizer):
            out = tokenizer(graph.x, tokenizer.propagation(graph.edges, graph.num_nodes))
            self.logits, self.index, self._embedding = out["logits"], out["index"], out["embedding"]
            self._book = tokenizer.codebook
            self.codes = tokenizer.codebook.codes
            self._scores = (
                tokenizer.codebook.scores(self._embedding)
                if len(self._embedding) * len(self.codes) <= SCORES_IN_MEMORY
                else None
            )

    def scores(self, nodes: Tensor) -> Tensor:
        """S of some nodes: (B, M)."""
        if self._scores is not None:
            return self._scores[nodes]
        with torch.no_grad():
            return self._book.scores(self._embedding[nodes])

    def figures(self, graph: NodeGraph) -> dict[str, float]:
        """`codes_used`, `code_perplexity`, and `code_information`: the mutual information, in nats, of a node's
        code with its class and degree, and that of shuffled codes."""
        from sklearn.metrics import mutual_info_score

        share = torch.bincount(self.index, minlength=len(self.codes)).double() / len(self.index)
        used = share[share > 0]
        degree = torch.bincount(graph.edges[0], minlength=graph.num_nodes)
        bucket = torch.log2(degree.float() + 1).long()
        known = (graph.labels >= 0).cpu()
        what = (graph.labels * 64 + bucket).cpu()[known].numpy()
        codes = self.index.cpu()[known].numpy()
        shuffled = np.random.default_rng(0).permutation(codes)
        return {
            "codes_used": float(len(used)),
            "code_perplexity": float((-(used * used.log()).sum()).exp()),
            "code_information": float(mutual_info_score(codes, what)),
            "code_information_shuffled": float(mutual_info_score(shuffled, what)),
        }


class VQGraph(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        t, s = config.tokenizer, config.student
        if s.layers < 2 and config.lamb_tok:
            raise UserError(
                "vqgraph: the code vector comes from a hidden layer: give student.layers at least 2, or set lamb_tok "
                "to 0."
            )
        return [
            Stage(
                "tokenizer",
                "train a graph network with a codebook (stored, shared)",
                {"teacher": f"GCN, {t.codes} codes"},
                steps=t.train.epochs,
            ),
            Stage("student", "distil codes and soft labels into the MLP", {"student": f"MLP, {s.layers} x {s.width}"}),
        ]

    def run(self, config: Config, run: Run) -> Student:
        graph = graph_of(config, run)
        seen = graph.observed()
        tokenizer, teacher_figures = self._tokenizer(config.tokenizer, run, graph, seen)
        tokens = Tokens(tokenizer, seen)
        train, labels = seen.split["train"], seen.labels[seen.split["train"]]
        mlp = new_student(config.student, graph, run)
        with keyed("model", "code map", run.seed):
            student = TokenStudent(mlp, graph.num_features).to(run.device)

        def loss(model: TokenStudent, batch: Batch) -> dict[str, Tensor]:
            nodes = batch["index"]
            terms = {}
            if config.lamb < 1 or config.lamb_tok:
                logits, vectors = model(seen.rows(nodes))
                terms["soft"] = (1 - config.lamb) * soft_label_loss(logits, tokens.logits[nodes])
                if config.lamb_tok:
                    scores = tokens.scores(nodes)
                    terms["tokens"] = config.lamb_tok * token_loss(
                        vectors, tokens.codes, scores, config.temperature, config.student_scores
                    )
            if config.lamb:
                terms["ce"] = config.lamb * F.cross_entropy(model.mlp(seen.rows(train)).float(), labels)
            return terms

        figures = fit_nodes(run, "student", student, loss, lambda m: m.mlp(seen.x), seen, config.train)
        return node_student(mlp, config, graph, {**teacher_figures, **tokens.figures(seen), **figures})

    @staticmethod
    def _tokenizer(
        spec: TokenizerSpec, run: Run, graph: NodeGraph, seen: NodeGraph
    ) -> tuple[Tokenizer, dict[str, float]]:
        """The trained tokenizer, a stage that every recipe with the same one shares, and its figures."""
        seed = run.seed if spec.seed is None else spec.seed
        with keyed("model", "teacher", seed):
            network = Tokenizer(graph.num_features, spec.width, graph.num_classes, spec.codes, spec.dropout).to(
                run.device
            )
        along = network.propagation(seen.edges, seen.num_nodes)
        train = seen.split["train"]

        def make() -> dict[str, Any]:
            sampler = NeighbourSampler(seen.edges.cpu(), seen.num_nodes, tuple(spec.fan_out)) if spec.fan_out else None

            def loss(model: Tokenizer, batch: Batch) -> dict[str, Tensor]:
                x, edges, path, labelled = seen.x, seen.edges, along, train
                if sampler is not None:
                    first = train[torch.randperm(len(train))[: spec.batch].to(train.device)]
                    nodes, edges = sampler.sample(first.cpu(), np.random.default_rng(int(torch.randint(1 << 62, ()))))
                    nodes, edges = nodes.to(train.device), edges.to(train.device)
                    x, path = seen.rows(nodes), model.propagation(edges, len(nodes))
                    out, target = model(x, path), seen.labels[first]
                    ce = F.cross_entropy(out["logits"][: len(first)], target)
                else:
                    out = model(x, path)
                    ce = F.cross_entropy(out["logits"][labelled], seen.labels[labelled])
                return {"ce": ce, **model.losses(out, edges, spec.edge_weight, spec.node_weight, spec.edge_sample)}

            figures = fit_nodes(
                run, "tokenizer", network, loss, lambda m: m(seen.x, along)["logits"], seen, spec.train, seed=seed
            )
            return {"weights": state_on_cpu(network), "figures": figures}

        stored = run.stage(
            "tokenizer", make, {"tokenizer": described(spec, spec.train), "graph": seen.fingerprint, "seed": seed}
        )
        network.load_state_dict(stored["weights"])
        with evaluating(network):
            logits = network(graph.x, network.propagation(graph.edges, graph.num_nodes))["logits"]
        return network, {**test_figures(logits, graph, "teacher_"), "teacher_seconds": stored["figures"]["seconds"]}
