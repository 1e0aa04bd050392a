"""Training of decoders: pretraining, recalibration after the drop, controls."""

try:
    import accelerate
    import rich
    import transformers
except ImportError as error:
    raise ImportError(
        f"drope_kernels.recalibrate trains with transformers.Trainer, and {error.name} is missing: "
        "pip install 'drope_kernels[train]'"
    ) from error

from drope_kernels.recalibrate.callbacks import LengthSweep
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import PackedRows, TokenRows, packed_rows
from drope_kernels.recalibrate.packed_folder import PackedFolder
from drope_kernels.recalibrate.packing import pack_documents
from drope_kernels.recalibrate.recalibration import RecalibrationResult, recalibrate
from drope_kernels.texts.documents import Document, Documents, read_documents

__all__ = [
    "Document",
    "Documents",
    "LengthSweep",
    "PackedFolder",
    "PackedRows",
    "RecalibrationConfig",
    "RecalibrationResult",
    "TokenRows",
    "pack_documents",
    "packed_rows",
    "read_documents",
    "recalibrate",
]

del accelerate, rich, transformers  # only asked whether they are there
