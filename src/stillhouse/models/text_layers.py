"""Where transformers hold hidden states, queries and keys: names of submodules to tap."""

from __future__ import annotations

from typing import Any

from torch import nn

from stillhouse.errors import UserError

LAYOUTS = (
    # the layers, what goes into the first of them, and the queries and keys of a layer
    ("encoder.layer", "embeddings", ("attention.self.query", "attention.self.key")),  # BERT, RoBERTa, ELECTRA
    ("transformer.layer", "embeddings", ("attention.q_lin", "attention.k_lin")),  # DistilBERT
    ("h", "drop", None),  # GPT-2
    ("layers", "embed_tokens", None),  # Llama, Qwen, Mistral, Gemma
    ("blocks", "patch_embed", None),  # vision transformers; patch_embed lacks the class token
)


def hidden_taps(model: nn.Module) -> list[str]:
    """Names of submodules whose outputs are the hidden states: the embeddings' first, then each layer's.

    Raises:
        UserError: a model of another layout.
    """
    base, prefix = _base(model)
    layers, first, _ = _layout(model)
    count = len(list(base.get_submodule(layers).children()))
    return [f"{prefix}{first}", *(f"{prefix}{layers}.{i}" for i in range(count))]


def attention_taps(model: nn.Module) -> list[tuple[str, str]]:
    """For each layer the names of the submodules whose outputs are its queries and its keys, of all heads.

    Raises:
        UserError: a model whose attention is no plain function of these, such as one with rotary positions.
    """
    base, prefix = _base(model)
    layers, _, parts = _layout(model)
    if parts is None:
        raise UserError(
            f"The attention maps of a {type(model).__name__} cannot be read from its queries and keys; compare hidden "
            "states."
        )
    count = len(list(base.get_submodule(layers).children()))
    return [(f"{prefix}{layers}.{i}.{parts[0]}", f"{prefix}{layers}.{i}.{parts[1]}") for i in range(count)]


def tap(model: nn.Module, name: str) -> str:
    """The submodule that `hidden:N` stands for (0: the embeddings, -1: the last layer), or `query:N` or `key:N` (of the
    N-th layer, from 0).

    Raises:
        UserError: a number that there is not, or a model of another layout.
    """
    kind, _, number = name.partition(":")
    names = hidden_taps(model) if kind == "hidden" else [pair[kind == "key"] for pair in attention_taps(model)]
    if not number.lstrip("-").isdigit() or not -len(names) <= int(number) < len(names):
        raise UserError(
            f"A {type(model).__name__} has {kind}:0 to {kind}:{len(names) - 1} ({kind}:-1 is the last), not '{name}'."
        )
    return names[int(number)]


def heads_of(model: nn.Module) -> int:
    """How many attention heads a model of transformers has."""
    config: Any = model.config
    return int(config.num_attention_heads)


def _base(model: nn.Module) -> tuple[nn.Module, str]:
    """The model, of transformers without its head, and what stands before the names of its parts."""
    base = getattr(model, "base_model", model)
    name = next((n for n, m in model.named_modules() if m is base), "")
    return base, f"{name}." if name else ""


def _layout(model: nn.Module) -> tuple[str, str, tuple[str, str] | None]:
    base, _ = _base(model)
    names = dict(base.named_modules())
    for layout in LAYOUTS:
        if layout[0] in names and layout[1] in names:
            return layout
    raise UserError(
        f"Where a {type(model).__name__} holds its hidden states is not known; known are models laid out as BERT, "
        "DistilBERT, GPT-2, Llama or a vision transformer of timm."
    )
