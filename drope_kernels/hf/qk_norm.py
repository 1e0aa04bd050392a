"""Learnable norms of queries and keys, added to the layers that lose their positions.

Source: DroPE, arXiv 2512.12167, section 5.1; the form is the authors' code: an RMSNorm of the whole
projection before it is split into heads, its weights 1 at first. The norm of each head is Qwen3's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

FORMS = ("full", "head")


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head: (B, H, S, D) to the same, weight (D,)."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast projections have 16 bits and weights 32: the norm is taken in 32.
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ProjectionNorm(HeadNorm):
    """RMSNorm of a token's heads as of one: (B, H, S, D) to the same, weight (H * D,)."""

    def forward(self, x: Tensor) -> Tensor:
        projection = x.transpose(1, 2).flatten(2)  # (B, S, H * D)
        return super().forward(projection).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def norms_of(attention: Any) -> tuple[nn.Module, nn.Module] | None:
    """The norms of queries and of keys that were added here, None: there are none."""
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "qk_norm") else None


def refuse_own_norms(attention: Any) -> None:
    """ValueError where a family normalises queries and keys itself."""
    if hasattr(attention, "q_norm") and norms_of(attention) is None:
        raise ValueError(
            f"qk_norm: expected None for a {attention.config.model_type}, which has norms of "
            "queries and keys of its own; leave it out"
        )


def add_norms(attention: Any, form: str) -> None:
    """Gives an attention module q_norm and k_norm with weights 1, as its projections are stored.

    Its attribute qk_norm says that they were added here, and in which form.
    """
    refuse_own_norms(attention)
    config, head_dim = attention.config, attention.head_dim
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        weight = getattr(attention, f"{name}_proj").weight
        options = {"eps": config.rms_norm_eps, "dtype": weight.dtype, "device": weight.device}
        norm = (
            ProjectionNorm(heads * head_dim, **options)
            if form == "full"
            else HeadNorm(head_dim, **options)
        )
        setattr(attention, f"{name}_norm", norm.train(attention.training))
    attention.qk_norm = form


def remove_norms(attention: Any) -> None:
    if norms_of(attention) is not None:
        del attention.q_norm, attention.k_norm, attention.qk_norm


def any_trained(attentions: Iterable[Any]) -> bool:
    """Whether a norm that was added here has weights other than 1."""
    norms = [norm for x in attentions for norm in norms_of(x) or ()]
    return any(bool((x != 1).any()) for norm in norms for x in norm.parameters())
