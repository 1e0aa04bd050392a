"""Length evaluation of any language model: needles, loss by position, RoPE baselines, temperature.

A model is any callable input_ids (B, S) int64 -> logits (B, S, V), or an object with `.logits`.
`drope_kernels.evaluate.report` writes the results as files and needs matplotlib for its plots;
`hf_model`, `hf_rope` and `run` are for transformers models, as `drope evaluate` measures them.
"""

from drope_kernels.evaluate.baselines import ROPE_METHODS, rope_at_length
from drope_kernels.evaluate.loss import (
    MeanLoss,
    PositionBucket,
    last_target_losses,
    log_spaced_edges,
    loss_by_position,
    mean_loss,
    window_losses,
)
from drope_kernels.evaluate.model_calls import DecodingModel, LanguageModel, SplitModel
from drope_kernels.evaluate.needle import (
    CaseScores,
    NeedleCases,
    NeedleTask,
    Proportion,
    score_needles,
)
from drope_kernels.evaluate.sweep import SweepData, SweepRow, draw_sweep, row_named, run_sweep
from drope_kernels.evaluate.temperature import fit_log_slope, fit_temperature
from drope_kernels.evaluate.written_needles import WRITTEN_TASKS, WrittenCases, write_cases
from drope_kernels.texts.windows import text_windows

__all__ = [
    "ROPE_METHODS",
    "WRITTEN_TASKS",
    "CaseScores",
    "DecodingModel",
    "LanguageModel",
    "MeanLoss",
    "NeedleCases",
    "NeedleTask",
    "PositionBucket",
    "Proportion",
    "SplitModel",
    "SweepData",
    "SweepRow",
    "WrittenCases",
    "draw_sweep",
    "fit_log_slope",
    "fit_temperature",
    "last_target_losses",
    "log_spaced_edges",
    "loss_by_position",
    "mean_loss",
    "rope_at_length",
    "row_named",
    "run_sweep",
    "score_needles",
    "text_windows",
    "window_losses",
    "write_cases",
]
