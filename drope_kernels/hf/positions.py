"""`drop_positions`, `restore_positions`: a transformers model without its rotation, and with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from drope_kernels.hf.apply import apply_state
from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.provenance import undo_export
from drope_kernels.hf.qk_norm import FORMS, any_trained, norms_of, refuse_own_norms
from drope_kernels.hf.state import DropState


def drop_positions(
    model: Any, layers: Iterable[int] | None = None, qk_norm: str | None = None
) -> Any:
    """Takes the rotation out of a transformers model's attention, in place.

    Queries and keys of the dropped layers reach the attention as they are projected, whatever the
    attention implementation: no rotation is computed, and no angles where no layer reads them.
    Masks, sliding windows and packing still follow position_ids. YaRN's attention factor stays in
    the logits, as a temperature. Caches filled before are of no use. Dropped layers stay dropped;
    more can follow, also of a compiled model, whose code is compiled again.

    Recorded in `config.drope`, which `load_model` reads. With every layer dropped and no qk_norm,
    `config.rope_parameters` turn nothing, so that stock transformers too loads what
    `save_pretrained` wrote, without temperatures: these, and other engines, need `export`.
    Source: DroPE, arXiv 2512.12167, section 5.

    Args:
        model: a `PreTrainedModel` of `FAMILIES`, possibly wrapped.
        layers: indices of layers, None: all of them.
        qk_norm: learnable RMSNorms for queries and keys of these layers, weights 1 at first:
            "full" over the whole projection, the authors' form, or "head" over each head.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: layers that are not there; norms that the family has already, of
            another form than before, or in a model whose wrapper would not know of them.
        NotImplementedError: a model of another family, with the reason.
    """
    decoder = decoder_of(model)
    wanted = _checked_layers(layers, len(decoder.layers))
    state = DropState.from_config(decoder.config)
    _check_norms(model, decoder, state, qk_norm, wanted)
    dropped = tuple(sorted({*state.dropped_layers, *wanted}))
    apply_state(decoder, replace(state, dropped_layers=dropped, qk_norm=qk_norm))
    return model


def restore_positions(model: Any, *, discard_qk_norm: bool = False) -> Any:
    """Undoes `drop_positions` and `set_temperature`, in place: the config and the rotation return.

    Norms that `drop_positions` added are removed.

    Args:
        model: as `drop_positions` takes it; one with all its positions is left as it is.
        discard_qk_norm: removes the norms even when they have been trained.

    Returns:
        The model.

    Raises:
        ValueError: added norms whose weights are no longer 1.
        NotImplementedError: a model of another family.
    """
    decoder = decoder_of(model)
    if not discard_qk_norm and any_trained(layer.self_attn for layer in decoder.layers):
        raise ValueError(
            "model: expected norms of queries and keys with weights 1, got trained ones, which "
            "would be lost; pass discard_qk_norm=True to lose them"
        )
    undo_export(decoder.config)
    state = DropState.from_config(decoder.config)
    apply_state(decoder, DropState(rope_parameters=state.rope_parameters))
    return model


def _checked_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    given = list(layers)
    for x in given:
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(
                f"layers: expected indices of layers, got {type(x).__name__}; leave it out for all"
            )
        if not 0 <= x < count:
            raise ValueError(f"layers: expected 0 to {count - 1}, got {x}; leave it out for all")
    if not given:
        raise ValueError("layers: expected at least one layer, got none; leave it out for all")
    return given


def _check_norms(
    model: Any, decoder: Any, state: DropState, qk_norm: str | None, wanted: list[int]
) -> None:
    """Norms of one form in every dropped layer, and new ones only where their owner sees them."""
    if qk_norm is not None and qk_norm not in FORMS:
        raise ValueError(
            f"qk_norm: expected None, {' or '.join(map(repr, FORMS))}, got {qk_norm!r}"
        )
    attentions = [layer.self_attn for layer in decoder.layers]
    if state.dropped_layers and qk_norm != state.qk_norm:
        raise ValueError(
            f"qk_norm: expected {state.qk_norm!r} as in the layers dropped before, got "
            f"{qk_norm!r}; call restore_positions first"
        )
    if qk_norm is None:
        return
    refuse_own_norms(attentions[0])
    new = [attentions[x] for x in wanted if norms_of(attentions[x]) is None]
    if new and not _is_plain(model, new[0].q_proj.weight):
        raise ValueError(
            f"model: expected a plain transformers model with qk_norm={qk_norm!r}, got a "
            f"{type(model).__name__} that is a wrapper, has adapters or is sharded, and would not "
            "know of the new weights; drop the positions first"
        )


def _is_plain(model: Any, weight: Any) -> bool:
    adapted = hasattr(model, "peft_config")
    return isinstance(model, PreTrainedModel) and not adapted and not isinstance(weight, DTensor)
