"""The tile kernels with errors planted in their sources, of which one at a time is switched on.

All of them are in one build: each is its line and the wrong one behind a number that tests set.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11
from repository import ROOT

MODULE = "planted_tiles_module"
GROWING = "growing_rows"  # not a case: growing_rows.check_growing_rows


@dataclass(frozen=True)
class Planted:
    """An error in a file of csrc/cpu/tiles, and what shows it: a named case, or GROWING."""

    name: str
    file: str
    right: str
    wrong: str
    case: str


PLANTED = (
    Planted(
        "reference_never_moves",
        "forward_item.h",
        "if (any(less(headroom, block_sum_[0])) || any(less(headroom, block_sum_[1]))) "
        "return false;",
        "",
        GROWING,
    ),
    Planted(
        "output_not_rebased",
        "forward_pipeline.h",
        "store(acc_o + i, load(acc_o + i) * row_scale);",
        "store(acc_o + i, load(acc_o + i));",
        GROWING,
    ),
    Planted(
        "sum_not_rebased",
        "forward_pipeline.h",
        "store(sum, load(sum) * row_scale);",
        "store(sum, load(sum));",
        GROWING,
    ),
    Planted(
        "whole_items_called_half",
        "forward.h",
        "item.half = range.any.end - key <= kStep;",
        "item.half = range.any.end - key <= kItemKeys;",
        "length_111",
    ),
    Planted(
        "end_of_range_not_masked",
        "forward.h",
        "item.masked = key < range.all.begin || key + (item.half ? kStep : kItemKeys) > "
        "range.all.end;",
        "item.masked = key < range.all.begin;",
        "length_111",
    ),
    Planted(
        "mask_off_by_one",
        "forward_pipeline.h",
        "store(row + c * kTile, mask.apply(load(row + c * kTile), c, key));",
        "store(row + c * kTile, mask.apply(load(row + c * kTile), c, key - 1));",
        "length_111",
    ),
    Planted(
        "keys_of_a_word_swapped",
        "forward_item.h",
        "store(words, to_words(even, odd));",
        "store(words, to_words(odd, even));",
        "length_111",
    ),
    Planted(
        "values_paired_wrongly",
        "pack.h",
        "PairStage(x, row, 2, 1)",
        "PairStage(x, row, 1, 1)",
        "length_111",
    ),
    Planted(
        "second_half_of_keys_left_out",
        "forward_item.h",
        "if (!item.half) tiles_.template multiply_add<7, 5, 3>();",
        "",
        "length_111",
    ),
    Planted(
        "delta_forgotten",
        "backward_queries.h",
        "terms.minus_delta[v] = select(empty, zero(), terms.scale[v] * (state.grad_lse - dots));",
        "terms.minus_delta[v] = zero();",
        "length_111",
    ),
    Planted(
        "last_grad_q_lost",
        "backward.h",
        "finish_grad_q<kDim>(tiles, scores);",
        "scores.pending = {};",
        "length_111",
    ),
    Planted(
        "pairs_of_queries_of_grad_k",
        "pack.h",
        "PairStage(x, row, 1, kTileRows)",
        "PairStage(x, row, 1, 1)",
        "length_111",
    ),
    Planted(
        "gradients_of_keys_unmasked",
        "backward_block.h",
        "if constexpr (kMasked) log2_p = mask_.apply(log2_p, v, key);",
        "",
        "length_111",
    ),
)

# The instance by itself: no other to choose from, none to leave calls to.
STAND_IN = """
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/attention_cpu.h"
#include "cpu/packed.h"

int planted_error = 0;

namespace drope {
namespace amx_emulated {
extern const CpuKernels kernels;
}
namespace nobody {
extern const CpuKernels kernels;
const CpuKernels kernels = {"nobody", nullptr, nullptr, nullptr, nullptr, nullptr};
}
const CpuKernels& cpu_kernels() { return amx_emulated::kernels; }
void attention_forward_cpu(const AttentionForwardParams& p, const CpuOptions& options) {
  amx_emulated::kernels.forward(p, options);
}
void attention_backward_cpu(const AttentionBackwardParams& p, const CpuOptions& options) {
  amx_emulated::kernels.backward(p, options);
}
}

PYBIND11_MODULE(planted_tiles_module, module) {
  drope::register_attention_forward(module);
  drope::register_attention_backward(module);
  module.def("plant", [](int error) { planted_error = error; });
}
"""


def planted_source(text: str, file: str) -> str:
    """A source with every error of its file behind its number, 1 and up."""
    for number, planted in enumerate(PLANTED, 1):
        if planted.file != file:
            continue
        if text.count(planted.right) != 1:
            raise ValueError(
                f"{file}: expected once, got {text.count(planted.right)} times: {planted.right}; "
                f"the error {planted.name} has to follow the source"
            )
        if planted.right.endswith(";"):
            either = (
                f"if (planted_error == {number}) {{ {planted.wrong} }} else {{ {planted.right} }}"
            )
        else:
            arguments = planted.right.removeprefix("PairStage(x, row, ").removesuffix(")")
            wrong = planted.wrong.removeprefix("PairStage(x, row, ").removesuffix(")")
            pairs = zip(arguments.split(", "), wrong.split(", "), strict=True)
            mixed = (f"(planted_error == {number} ? {w} : {r})" for r, w in pairs)
            either = f"PairStage(x, row, {', '.join(mixed)})"
        text = text.replace(planted.right, either)
    return text


def build(folder: Path) -> ModuleType:
    """The emulated tile kernels, all errors in them and none switched on: `plant(number)` does."""
    tiles = folder / "cpu" / "tiles"
    shutil.copytree(ROOT / "csrc" / "cpu" / "tiles", tiles)
    for path in tiles.glob("*.h"):
        text = path.read_text(encoding="utf-8")
        if path.name == "tile_emulated.h":
            text = text.replace("#pragma once\n", "#pragma once\nextern int planted_error;\n")
        path.write_text(planted_source(text, path.name), encoding="utf-8")
    (folder / "stand_in.cpp").write_text(STAND_IN, encoding="utf-8")
    bindings, csrc = ROOT / "python_bindings", ROOT / "csrc"
    library = folder / f"{MODULE}.so"
    common = ["g++", "-std=c++17", "-fPIC", "-fno-math-errno", "-fvisibility=hidden"]
    includes = [folder, csrc, bindings, pybind11.get_include(), sysconfig.get_path("include")]
    common += [f"-I{path}" for path in includes]
    kernels = folder / "kernels.o"
    subprocess.run(
        [
            *common,
            *("-O2", "-ftree-vectorize", "-ffp-contract=off", "-DDROPE_INLINE=inline"),
            *("-mavx2", "-mfma", "-mf16c"),
            *("-DDROPE_LANES=nobody", "-c", str(tiles / "attention_amx_emulated.cpp")),
            *("-o", str(kernels)),
        ],
        check=True,
    )
    sources = [
        folder / "stand_in.cpp",
        *(bindings / f"attention_{name}.cpp" for name in ("forward", "backward")),
        *(csrc / "cpu" / name for name in ("packed.cpp", "parallel.cpp", "scratch.cpp")),
        *(csrc / "cpu" / "tiles" / name for name in ("serves.cpp", "find_amx_nowhere.cpp")),
    ]
    subprocess.run(
        [
            *(*common, "-O0", "-shared", "-pthread", *map(str, sources), str(kernels)),
            *("-o", str(library)),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
