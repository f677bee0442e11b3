"""Codebook, token loss and tokenizer of VQGraph against the arrays of `vqgraph`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.graphs.vqgraph import Codebook, Tokenizer, token_loss

VALUES, GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-3}


def vq_step(case: Case) -> None:
    p = case.params
    steps = case.leaf("x")
    book = (
        Codebook(len(case["embed0"]), steps.shape[-1], p["decay"], p["commitment_weight"])
        .to(steps.dtype)
        .train(p["train"])
    )
    book.codes = case["embed0"].clone()
    for x in steps:
        scores = book.scores(x)
        quantized, index, loss, _ = book(x)
    ((quantized * case["upstream"]).sum() + loss).backward()
    for name, value in {"quantize": quantized, "indices": index, "loss": loss.reshape(1), "dist": scores}.items():
        case.close(name, value, **VALUES)
    case.close("embed1", book.codes, **VALUES)
    case.close("cluster_size", book.cluster_size, **VALUES)
    case.close("grad:x", steps.grad[-1], rtol=1e-3, atol=1e-6)


def tokens(case: Case) -> None:
    p = case.params
    loss = p["lamb"] * token_loss(case.leaf("student_vq"), case["codebook"], case["teacher_scores"], p["temperature"])
    loss.backward()
    case.close("loss_intended", loss, **VALUES)
    case.close_grad("student_vq", array="grad:intended", **GRADIENTS)


def tokenizer_gcn(case: Case) -> None:
    p, w, x = case.params, case.weights, case["x"]
    network = Tokenizer(
        x.shape[1],
        w["graph_layer_2.bias"].shape[0],
        w["linear.weight"].shape[0],
        p["codebook_size"],
        p["dropout"],
        by_code=False,
    )
    ours = {
        "encode.lin.weight": w["graph_layer_1.weight"].t(),
        "encode.bias": w["graph_layer_1.bias"],
        "to_edges.weight": w["decoder_1.weight"],
        "to_edges.bias": w["decoder_1.bias"],
        "to_nodes.weight": w["decoder_2.weight"],
        "to_nodes.bias": w["decoder_2.bias"],
        "classify.lin.weight": w["graph_layer_2.weight"].t(),
        "classify.bias": w["graph_layer_2.bias"],
        "fc.weight": w["linear.weight"],
        "fc.bias": w["linear.bias"],
        "codebook.codes": w["vq._codebook.embed"][0],
        "codebook.cluster_size": w["vq._codebook.cluster_size"][0],
    }
    network.to(x.dtype).load_state_dict(ours)
    edges = (case["adj"] - torch.eye(len(x))).nonzero().t()
    along = network.propagation(edges, len(x))
    h = network.train().embed(x, along)
    case.close("h1", h, **VALUES)
    if "h1" in case:  # to the bit: rounding decides among the nodes of one code where the edge term is largest
        h = case["h1"] + (h - h.detach())
    dist = network.codebook.scores(h)
    out = network.decode(h, along)
    terms = network.losses(out, edges, p["lamb_edge"], p["lamb_node"])
    loss = sum(terms.values())
    total = loss + F.cross_entropy(out["logits"][case["train_idx"]], case["labels"][case["train_idx"]])
    total.backward()
    given = {"quantized": out["quantized"], "h2": out["hidden"], "logits": out["logits"], "dist": dist}
    for name, value in {
        **given,
        "tokenizer_loss": loss.reshape(1),
        "total": total,
        "codebook_after": network.codebook.codes,
    }.items():
        case.close(name, value, **VALUES)
    first = network.encode.lin.weight
    assert first.grad is not None
    free = ties(along @ x, out, network)
    if "grad:graph_layer_1_weight" in case:
        expected = case["grad:graph_layer_1_weight"].flatten().double()
        moved = first.grad.t().double().flatten()
        first.grad = (moved + free @ (free.T @ (expected - moved))).view_as(first).t().to(first.dtype)
    for name, parameter in {
        "graph_layer_1": first,
        "decoder_1": network.to_edges.weight,
        "decoder_2": network.to_nodes.weight,
    }.items():
        grad = parameter.grad.t() if name == "graph_layer_1" else parameter.grad
        case.close(f"grad:{name}_weight", grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


def ties(seen: Tensor, out: dict[str, Tensor], network: Tokenizer) -> Tensor:
    """(D * D, directions), orthonormal: where the gradient of the first layer depends on rounding alone.

    All nodes of one code have one embedding, so that the largest and the smallest of the products belong to many pairs
    of nodes; to which of them, with another input each, the gradient goes is decided by the last bit.
    """
    z = out["to_edges"].detach()
    products, alive = z @ z.T, (out["embedding"] > 0).to(z.dtype)
    near = 1e-5 * (products.max() - products.min())
    codes = out["index"].tolist()
    directions = {}
    for end in (products.max(), products.min()):
        for i, j in ((products - end).abs() <= near).nonzero().tolist():
            directions[i, codes[j]] = torch.outer(
                seen[i], alive[i] * (z[j] @ network.to_edges.weight.detach())
            ).flatten()
    basis, sizes, _ = torch.linalg.svd(torch.stack(list(directions.values()), 1).double(), full_matrices=False)
    return basis[:, sizes > 1e-6 * sizes[0]]


ADAPTERS = {"vq_step": vq_step, "token_loss": tokens, "tokenizer_gcn": tokenizer_gcn}
