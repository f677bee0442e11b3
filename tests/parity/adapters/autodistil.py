"""Sub-networks of a BERT encoder, their relations and loss, and the sorted space, against arrays of `autodistil`."""

from __future__ import annotations

import numpy as np
import torch
from transformers import BertConfig, BertModel

from parity.case import Case
from stillhouse.methods.language.autodistil.networks import SuperNet
from stillhouse.methods.language.autodistil.space import Space, Whole, drawn
from stillhouse.methods.language.autodistil.training import relation, relation_distance

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def supernet_of(case: Case) -> SuperNet:
    p, weights = case.params, case.weights
    words, width = weights["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=p["layers"],
        num_attention_heads=p["heads"],
        intermediate_size=p["intermediate"],
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=weights["embeddings.token_type_embeddings.weight"].shape[0],
        layer_norm_eps=p.get("layer_norm_eps", 1e-12),
        hidden_dropout_prob=p.get("dropout", 0),
        attention_probs_dropout_prob=p.get("dropout", 0),
    )
    plain = BertModel(config, add_pooling_layer=False)
    plain.load_state_dict(weights)
    return SuperNet(plain).eval()


def superlm(case: Case) -> None:
    supernet, heads = supernet_of(case), case.params["teacher_relation_heads"]
    inputs = {"input_ids": case["input_ids"]}
    mask = None
    if "attention_mask" in case:
        mask = inputs["attention_mask"] = case["attention_mask"]
    padded = torch.zeros(case["input_ids"].shape) if mask is None else 1 - mask
    targets = [case[f"teacher_{part}"] for part in ("qq", "kk", "vv")]
    total = torch.zeros(())
    for i, multipliers in enumerate(case.params["subs"]):
        net = supernet.whole.subnet(*multipliers)
        case.close(f"sub{i}_hidden", supernet.hidden(net, inputs), **CLOSE)
        found = [relation(x, heads, mask) for x in supernet.queries_keys_values(net, inputs)]
        for part, value in zip(("qq", "kk", "vv"), found):
            real = (padded[:, None, None, :] == 0).expand(value.shape)
            case.close(f"sub{i}_{part}", value, **CLOSE, where=real)
            case.close(f"sub{i}_{part}", value, rtol=1e-4, atol=2e-3)
        loss = relation_distance(found, targets)
        case.close(f"sub{i}_loss", loss, **CLOSE)
        total = total + loss
    case.close("total_loss", total, **CLOSE)
    total.backward()
    names = dict(supernet.encoder.named_parameters())
    for array in case.under("grad"):
        case.close_grad(array, names[array], rtol=1e-4, atol=2e-5)


def space(case: Case) -> None:
    config = case.params["config"]
    whole = Whole(
        config["layers"],
        config["heads"],
        config["hidden"],
        config.get("intermediate", 4 * config["hidden"]),
        config.get("vocab_size", 30522),
        config.get("max_position_embeddings", 512),
        config.get("type_vocab_size", 2),
    )
    depth, heads, hidden, ratio = (np.linspace(*values) for values in case.params["ranges"])
    nets = [whole.subnet(d, h, w, r) for d in depth for h in heads for w in hidden for r in ratio]
    members = Space(
        depth=[n.depth for n in nets],
        hidden=[n.hidden for n in nets],
        ratio=[n.ratio for n in nets],
        heads=[n.heads for n in nets],
    ).members(whole)
    shares = [[n.depth / whole.layers, n.heads / whole.heads, n.hidden / whole.hidden, n.ratio] for n in members]
    case.close("subnets", np.array(shares))
    case.close("param_counts", np.array([whole.parameter_count(n) for n in members]))
    if "sampled_index" in case:
        case.close("sampled_index", np.array([drawn(len(members), step) for step in range(len(case["sampled_index"]))]))


ADAPTERS = {"superlm": superlm, "space": space}
