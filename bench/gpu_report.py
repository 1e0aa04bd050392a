"""The GPU tables of docs/benchmarks.md and README.md, from results or from the lack of them.

python -m bench.gpu_report save RESULTS...  tars or folders of tools/gpu_check.sh to bench/results/
python -m bench.gpu_report docs             the GPU section of docs/benchmarks.md; prints README's
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.gpu.cases import GROUPS, GpuCase
from bench.gpu.peer_calls import PEERS
from bench.gpu.sm80 import SM80
from bench.gpu.small_calls import NAMES, SDPA, SMALL
from bench.machine import ROOT

from . import gpu_results
from .gpu_results import GpuResults, Row

DOCS, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- GPU tables: begin -->", "<!-- GPU tables: end -->"
NOT_MEASURED = "not measured"
OURS, TRITON = "cuda", "triton"
PEER_NAMES = [peer.name for peer in PEERS]
PASSES = ("forward", "backward", "train")
COPIED = "terabytes_per_second"


def number(row: Row | None, key: str) -> float | None:
    value = None if row is None else row.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 20 else f"{value:.0f}"


def median_ms(row: Row | None, kind: str) -> float | None:
    return None if row is None or kind not in row else float(row[kind]["median_ms"])


def spread(row: Row, kind: str) -> str:
    """Distance of the quartiles over the median."""
    if kind not in row:
        return "-"
    times = row[kind]
    return f"{(times['p75_ms'] - times['p25_ms']) / times['median_ms']:.1%}"


def over(ours: float | None, theirs: float | None) -> str:
    return "-" if ours is None or not theirs else f"{ours / theirs:.2f}x"


def share(value: float | None, ceiling: float | None) -> str:
    return "-" if value is None or not ceiling else f"{value / ceiling:.0%}"


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *["| " + " | ".join(x) + " |" for x in lines]]


def ceiling(results: GpuResults, name: str, key: str) -> float | None:
    return number((results.ceilings or {}).get(name), key)


def why_not(row: Row | None) -> str:
    """A row without times: not asked for, or its error's kind."""
    if row is None:
        return NOT_MEASURED
    return f"{NOT_MEASURED}: {str(row.get('error', '')).split(':')[0]}"


def peers_line(results: GpuResults, case: GpuCase, kinds: list[str]) -> list[str]:
    """For each peer: our rate over its, pass by pass."""
    ours, cells = results.row(case, OURS), []
    for name in PEER_NAMES:
        theirs = results.row(case, name)
        ratios = [over(number(ours, kind), number(theirs, kind)) for kind in kinds]
        cells.append("-" if set(ratios) == {"-"} else " / ".join(ratios))
    return cells


def prefill_table(results: GpuResults) -> list[str]:
    """Forward, backward and both; what each reaches of the matmul of the same run."""
    header = ["case, bf16", "forward", "spread", "backward", "forward + backward", "of matmul"]
    header += ["extra MiB", *[f"over {name}" for name in PEER_NAMES]]
    matmul, lines = ceiling(results, "matmul", "tflops"), []
    for case in gpu_results.all_cases():
        if case.shape.is_decode or case.rope:
            continue
        row = results.row(case, OURS)
        if row is None or "forward" not in row:
            lines.append([case.label, why_not(row), *[""] * (len(header) - 2)])
            continue
        rates = [number(row, f"{kind}_tflops") for kind in PASSES]
        memory = row.get("peak_bytes", {}).get("train" if case.shape.backward else "forward")
        cells = [rate(rates[0]), spread(row, "forward"), rate(rates[1]), rate(rates[2])]
        cells += [share(rates[0], matmul), "-" if memory is None else f"{memory / 2**20:.0f}"]
        kinds = ["forward_tflops", *(["backward_tflops"] if case.shape.backward else [])]
        lines.append([case.label, *cells, *peers_line(results, case, kinds)])
    return markdown(header, lines)


def sm80_table(results: GpuResults) -> list[str]:
    """The kernels for compute capability 8.x, on this GPU, where sm_90a kernels run by default."""
    header = ["case, bf16", "forward", "spread", "of matmul", "over sdpa_flash"]
    matmul, lines = ceiling(results, "matmul", "tflops"), []
    for case in GROUPS["quick"]:
        if case.shape.is_decode or case.rope:
            continue
        row, flash = results.row(case, SM80), results.row(case, "sdpa_flash")
        reached = number(row, "forward_tflops")
        if row is None or reached is None:
            lines.append([case.label, why_not(row), *[""] * (len(header) - 2)])
            continue
        cells = [rate(reached), spread(row, "forward"), share(reached, matmul)]
        lines.append([case.label, *cells, over(reached, number(flash, "forward_tflops"))])
    return markdown(header, lines)


def triton_table(results: GpuResults) -> list[str]:
    """The Triton kernels beside ours in CUDA and torch's."""
    header = ["case, bf16", "forward", "spread", "backward", "of the ceiling", "over sdpa_flash"]
    header += [f"over {OURS}"]
    lines, cases = [], {case.label: case for case in GROUPS["quick"] + GROUPS["decode"]}
    for case in cases.values():
        kinds, limit = ["forward_tflops"], ceiling(results, "matmul", "tflops")
        kinds += ["backward_tflops"] if case.shape.backward else []
        if case.shape.is_decode:
            kinds, limit = [COPIED], ceiling(results, "copy", COPIED)
        row = results.row(case, TRITON)
        rates = [number(row, kind) for kind in kinds]
        if row is None or rates[0] is None:
            lines.append([case.label, why_not(row), *[""] * (len(header) - 2)])
            continue
        cells = [rate(rates[0]), spread(row, "forward"), rate(rates[1]) if rates[1:] else "-"]
        cells.append(share(rates[0], limit))
        for other in (results.row(case, name) for name in ("sdpa_flash", OURS)):
            ratios = [over(number(row, kind), number(other, kind)) for kind in kinds]
            cells.append("-" if set(ratios) == {"-"} else " / ".join(ratios))
        lines.append([case.label, *cells])
    return markdown(header, lines)


def launch_table(results: GpuResults) -> list[str]:
    """What a call costs the host, and the first call of a process."""
    steady = [(name, "host_us") for name in (OURS, TRITON, SDPA)]
    header = [f"call, B{SMALL.batch} H{SMALL.num_heads}/{SMALL.num_heads_kv} S{SMALL.seqlen}"]
    header[0] += f" D{SMALL.head_dim}"
    header += [f"{name}, us" for name, _ in steady]
    header += [f"first {OURS}, s", f"first {TRITON}, s", "with its kernels on disk, s"]
    lines = []
    for call in NAMES:
        cells = []
        for name, key in steady:
            us = results.launches.get(name, {}).get(key, {}).get(call)
            cells.append(NOT_MEASURED if us is None else f"{us:.0f}")
        for name, cache in ((OURS, "cold"), (TRITON, "cold"), (TRITON, "warm")):
            runs = results.launches.get(name, {}).get("first_seconds", {})
            seconds = runs.get(cache, {}).get(call)
            cells.append(NOT_MEASURED if seconds is None else f"{seconds:.2f}")
        lines.append([call, *cells])
    return markdown(header, lines)


def decode_table(results: GpuResults) -> list[str]:
    header = ["case, bf16", "us", "spread", "TB/s", "of copy"]
    header += [f"over {name}" for name in PEER_NAMES]
    copy, lines = ceiling(results, "copy", COPIED), []
    for case in gpu_results.all_cases():
        if not case.shape.is_decode:
            continue
        row = results.row(case, OURS)
        milliseconds = median_ms(row, "forward")
        if row is None or milliseconds is None:
            lines.append([case.label, why_not(row), *[""] * (len(header) - 2)])
            continue
        reached = number(row, COPIED)
        cells = [f"{1e3 * milliseconds:.0f}", spread(row, "forward"), rate(reached)]
        cells.append(share(reached, copy))
        lines.append([case.label, *cells, *peers_line(results, case, [COPIED])])
    return markdown(header, lines)


def rope_table(results: GpuResults, name: str) -> list[str]:
    """What rotating costs over the same call without, and over the best peer with its kernel."""
    header = ["case, bf16", "forward ms", "rope costs", "forward + backward ms", "rope costs"]
    header += ["over the best peer + rotary kernel"]
    lines = []
    for case in (case for case in gpu_results.all_cases() if case.rope):
        if case.shape.is_decode:
            continue
        row, plain = results.row(case, name), results.row(case, f"{name}_no_rope")
        if row is None or "forward" not in row:
            lines.append([case.label, why_not(row), *[""] * (len(header) - 2)])
            continue
        cells = []
        for kind in ("forward", "train"):
            ours, without = median_ms(row, kind), median_ms(plain, kind)
            cells.append("-" if ours is None else f"{ours:.3f}")
            cost = None if ours is None or without is None else ours / without - 1
            cells.append("-" if cost is None else f"{cost:+.1%}")
        best = best_peer(results, case, "train_tflops")
        ratio = over(number(row, "train_tflops"), number(best, "train_tflops"))
        cells.append(ratio if best is None else f"{ratio} {best['contender']}")
        lines.append([case.label, *cells])
    return markdown(header, lines)


def best_peer(results: GpuResults, case: GpuCase, key: str) -> Row | None:
    rows = [results.row(case, name) for name in PEER_NAMES]
    rated = [row for row in rows if number(row, key) is not None]
    return max(rated, key=lambda row: number(row, key) or 0.0, default=None)


def about(results: GpuResults) -> str:
    if not results.machine:
        return "Nothing was measured on a GPU yet: every row says so."
    found = results.machine
    versions = found.get("versions", {})
    copy, matmul = (
        ceiling(results, "copy", COPIED),
        ceiling(results, "matmul", "tflops"),
    )
    return (
        f"{found['gpu']}, driver {found['driver']}, torch {versions.get('torch')}, "
        f"{found['date']}, commit {found['commit']}; copy {rate(copy)} TB/s (read + write), "
        f"bf16 matmul 8192 {rate(matmul)} TFLOP/s."
    )


def section(results: GpuResults) -> str:
    """What stands between the two marks of docs/benchmarks.md."""
    parts = [about(results), "", "TFLOP/s of useful operations, backward alone and with forward:"]
    parts += ["", *prefill_table(results), "", "The sm_80 kernels on the same GPU:", ""]
    parts += [*sm80_table(results), "", "Decode, one query a row, the cache read once:", ""]
    parts += [*decode_table(results), "", "Rotation inside the call, the pass over k included:"]
    parts += ["", *rope_table(results, OURS), ""]
    parts += ["The Triton kernels, TFLOP/s, of a decode TB/s:", "", *triton_table(results), ""]
    parts += ["Rotation inside the call, Triton:", "", *rope_table(results, TRITON), ""]
    parts += ["What a small call costs before its kernel runs: the host's time for one of many in"]
    parts += ["a row, and the first call of a process, with nothing compiled for Triton yet and"]
    return "\n".join([*parts, "with what an earlier process compiled:", "", *launch_table(results)])


def readme_table(results: GpuResults) -> str:
    """Six lines for README.md."""
    quick = GROUPS["quick"]
    header = ["bf16", "ours", "vs SDPA flash", "vs SDPA cuDNN"]
    lines = []
    for case in (x for x in quick if x.shape.seqlen_kv == 4096 or x.shape.is_decode):
        unit, kinds = "TFLOP/s", ["forward_tflops", "backward_tflops"]
        if case.shape.is_decode:
            unit, kinds = "TB/s", [COPIED]
        row = results.row(case, OURS)
        if row is None or number(row, kinds[0]) is None:
            lines.append([case.label, NOT_MEASURED, "", ""])
            continue
        ours = " / ".join(rate(number(row, kind)) for kind in kinds)
        peers = dict(zip(PEER_NAMES, peers_line(results, case, kinds), strict=True))
        lines.append([case.label, f"{ours} {unit}", peers["sdpa_flash"], peers["sdpa_cudnn"]])
    return "\n".join(markdown(header, lines))


def between_marks(path: Path) -> str | None:
    """The text between the two marks; None in a file without them."""
    text = path.read_text()
    return text.split(BEGIN)[1].split(END)[0].strip() if BEGIN in text else None


def write_between_marks(path: Path, new: str) -> None:
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{new}\n\n{END}{after}")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 and arguments[0] == "save":
        print(gpu_results.save(gpu_results.collect(*map(Path, arguments[1:]))))
    elif arguments == ["docs"]:
        results = gpu_results.newest()
        for path, text in ((DOCS, section(results)), (README, readme_table(results))):
            if between_marks(path) is None:
                print(f"{path}: no marks, nothing written; its text would be\n\n{text}")
            else:
                write_between_marks(path, text)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
