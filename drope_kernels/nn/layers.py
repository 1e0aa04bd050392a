"""Decoder layers on `attention()`: Llama's architecture and names, positions that can be dropped.

`DecoderLM` is transformers' `LlamaForCausalLM` in its parameter names and its numbers, so a Llama
state dict loads with no key missing. Beyond Llama: `set_positions` changes or drops the rotation
of every layer, `set_scale` sets the softmax temperature, and three switches that are off by
default (`qk_norm`, `smear_keys`, `embedding_norm`).

Shape letters: B batch, S tokens, H query heads, K key/value heads, D head dim, E hidden size,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drope_kernels.attention import attention
from drope_kernels.console.paths import user_path
from drope_kernels.nn.config import DecoderConfig, QKNorm, check_choice
from drope_kernels.nn.file import read_decoder, write_decoder
from drope_kernels.nn.loss import causal_lm_loss, chunked_causal_lm_loss
from drope_kernels.rope import Rope
from drope_kernels.scale import LogScale


class DropeAttention(nn.Module):
    """Causal self-attention whose rotation can be changed, weakened or removed after construction.

    Args:
        hidden_size: E, width of the residual stream.
        num_heads, num_kv_heads: H and K (default H); H must be a multiple of K.
        head_dim: D, default E // H.
        rope: a `Rope`, True for `Rope()`, or False for no positions at all.
        rope_strength: in [0, 1], multiplies every rotation angle; 0 is the same as rope=False.
        qk_norm: None; "full", an RMSNorm over all heads of the projection, before the split (the
            form of the DroPE authors' code and of OLMo 2); "head", one over each head (Qwen 3).
        smear_keys: add to each key the previous token's key times one learned weight per kv head,
            before any rotation. The weight is unbounded (training drives it above 1 and below 0)
            and starts at 0.5. It stays when positions are dropped: a local order signal that makes
            position-free training easier than in the paper, which any report must say.
        scale: the whole multiplier of q.k: a float, a `LogScale` (evaluated at the sequence
            length) or None for D ** -0.5.
        bias: biases on the four projections.
        backend: passed to `attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope: Rope | bool = True,
        rope_strength: float = 1.0,
        qk_norm: QKNorm | None = None,
        smear_keys: bool = False,
        scale: float | LogScale | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}"
            )
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_heads={num_heads}, got {hidden_size}; "
                "or pass head_dim"
            )
        check_choice("qk_norm", qk_norm, (None, "full", "head"))
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.qk_norm, self.backend = qk_norm, backend
        q_dim, kv_dim = num_heads * self.head_dim, num_kv_heads * self.head_dim

        self.q_proj = nn.Linear(hidden_size, q_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, hidden_size, bias=bias)
        if qk_norm is not None:
            full = qk_norm == "full"
            self.q_norm = nn.RMSNorm(q_dim if full else self.head_dim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(kv_dim if full else self.head_dim, eps=norm_eps)
        self.k_smear = nn.Parameter(torch.full((num_kv_heads,), 0.5)) if smear_keys else None
        self.set_positions(rope, rope_strength)
        self.set_scale(scale)

    def set_positions(self, rope: Rope | bool, strength: float = 1.0) -> None:
        """Rotate by `rope` from the next call on (True: `Rope()`, False: not at all)."""
        if not isinstance(rope, (Rope, bool)):
            raise TypeError(f"rope: expected a Rope, True or False, got {type(rope).__name__}")
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"rope_strength: expected a number in [0, 1], got {strength}")
        rope = Rope() if rope is True else rope
        if isinstance(rope, Rope) and strength < 1.0:
            plain = strength == 0.0 and rope.attention_factor == 1.0
            rope = False if plain else rope.with_strength(strength)
        self.rope: Rope | bool = rope

    def set_scale(self, scale: float | LogScale | None, length: int | None = None) -> None:
        """Set the multiplier of q.k; a `LogScale` takes `length` or else the sequence length."""
        self.scale, self.scale_length = scale, length

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, E) to (B, S, E); token i sees tokens 0..i."""
        batch, seqlen, _ = hidden.shape
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, seqlen, self.num_heads, self.head_dim)
        k = k.view(batch, seqlen, self.num_kv_heads, self.head_dim)
        v = v.view(batch, seqlen, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.k_smear is not None:
            previous = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1]  # (B, S, K, D), zeros before token 0
            k = torch.addcmul(k, previous, self.k_smear.to(k.dtype)[:, None])
        out = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            rope=self.rope,
            scale=self._scale_at(seqlen),
            backend=self.backend,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _scale_at(self, seqlen: int) -> float | None:
        if isinstance(self.scale, LogScale):
            return self.scale(self.scale_length or seqlen, self.head_dim)
        return self.scale

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, rope={self.rope}, qk_norm={self.qk_norm}"
        )


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (B, S, E) to (B, S, E)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderBlock(nn.Module):
    """Pre-norm Llama block: attention, then the gated MLP, each on the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = DropeAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rope=config.rope_of_layer(layer),
            qk_norm=config.qk_norm,
            smear_keys=config.smear_keys,
            bias=config.attention_bias,
            norm_eps=config.norm_eps,
            backend=config.backend,
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, E) to (B, S, E)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DecoderStack(nn.Module):
    """Embedding, blocks and final norm (transformers' `LlamaModel`): (B, S) ids to (B, S, E)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = (
            nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if config.embedding_norm else None
        )
        self.layers = nn.ModuleList(DecoderBlock(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        for block in self.layers:
            hidden = block(hidden)
        return self.norm(hidden)


class DecoderOutput(NamedTuple):
    """What `DecoderLM` returns; `transformers.Trainer` reads it by position."""

    loss: Tensor | None  # () float32
    logits: Tensor | None  # (B, S or logits_to_keep, V); None when the loss was taken in chunks


class DecoderLM(nn.Module):
    """A causal language model with transformers' Llama parameter names and numbers."""

    accepts_loss_kwargs = True  # transformers.Trainer: the loss is normalised by what it passes

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize(config.init_std or config.hidden_size**-0.5)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.register_load_state_dict_pre_hook(_fill_tied_head)

    def _initialize(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def attentions(self) -> list[DropeAttention]:
        """The attention of each layer, first layer first."""
        return [module for module in self.modules() if isinstance(module, DropeAttention)]

    def set_positions(
        self, rope: Rope | bool, layers: Iterable[int] | None = None, *, strength: float = 1.0
    ) -> None:
        """Use `rope` in the given layers (default: all): a scaling, True for `Rope()`, False none.

        Weights do not change, so any earlier setting can be restored by another call.
        """
        chosen = range(len(self.attentions)) if layers is None else list(layers)
        for layer in chosen:
            self.attentions[layer].set_positions(rope, strength)

    def drop_positions(self) -> None:
        """Remove the rotation from every layer: the step that recalibration follows."""
        self.set_positions(False)

    def set_scale(self, scale: float | LogScale | None, length: int | None = None) -> None:
        """Softmax temperature of every layer at test time.

        A `LogScale` is evaluated at `length` or, by default, at each call's sequence length; a
        float is the whole multiplier of q.k; None restores D ** -0.5.
        """
        for layer in self.attentions:
            layer.set_scale(scale, length)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
        logits_to_keep: int = 0,
        loss_chunk: int | None = None,
    ) -> DecoderOutput:
        """Logits, and the next-token loss when `labels` is given.

        Args:
            input_ids: (B, S) int64.
            labels: (B, S) int64, `input_ids` with -100 where there is no target; the shift by one
                happens here.
            loss_weights: (B, S) float; entry t weighs the prediction *of* token t.
            num_items_in_batch: divisor of the weighted sum, default the sum of the weights; given
                by the trainer when several micro-batches make one step.
            logits_to_keep: only the last so many positions' logits (0: all).
            loss_chunk: take the loss over so many positions at a time, recomputed in backward, so
                that (B, S, V) never exists; `logits` is then None.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected (B, S), got {tuple(input_ids.shape)}")
        for name, column in (("labels", labels), ("loss_weights", loss_weights)):
            if column is not None and column.shape != input_ids.shape:
                raise ValueError(
                    f"{name}: expected the shape of input_ids {tuple(input_ids.shape)}, "
                    f"got {tuple(column.shape)}; the shift by one happens here"
                )
        hidden = self.model(input_ids)
        if labels is None:
            return DecoderOutput(None, self.lm_head(hidden[:, -logits_to_keep:]))
        if loss_chunk is None:
            logits = self.lm_head(hidden)
            loss = causal_lm_loss(logits, labels, loss_weights, num_items_in_batch)
            return DecoderOutput(loss, logits[:, -logits_to_keep:])
        loss = chunked_causal_lm_loss(
            self.lm_head, hidden, labels, loss_weights, num_items_in_batch, chunk=loss_chunk
        )
        return DecoderOutput(loss, None)

    def save(
        self, path: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write weights and config, positions as they are now, to one safetensors file.

        The file appears whole or not at all: it is written beside `path` and then renamed. Needs
        the safetensors package. `state_dict` replaces the model's own (gathered from shards).
        """
        config = dataclasses.replace(self.config, rope=[layer.rope for layer in self.attentions])
        write_decoder(user_path(path), state_dict or self.state_dict(), config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: str | None = None) -> DecoderLM:
        """Read what `save` wrote; `backend` replaces the saved choice."""
        config, state = read_decoder(user_path(path))
        if backend is not None:
            config.backend = backend
        model = cls(config)
        model.load_state_dict(state)
        return model


def _fill_tied_head(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any
) -> None:
    """transformers leaves the tied head out of its files."""
    embedding = state_dict.get(prefix + "model.embed_tokens.weight")
    if embedding is not None:
        state_dict.setdefault(prefix + "lm_head.weight", embedding)
