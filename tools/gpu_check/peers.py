"""Stage peers: what the incumbents reach on this machine, each checked before it is timed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exact, machine, timing
from .failures import CALL_ERRORS
from .peer_calls import PEERS, Attention, Peer, rotary_tables, rotate_half_split
from .peer_cases import PeerCase, attention_cases, decode_cases, rope_cases
from .report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome

COPY_BYTES = 4 << 30
RESERVE_SECONDS = 40  # nothing new is started when less is left


def make_inputs(case: PeerCase, device: str, dtype: torch.dtype) -> exact.Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int, seqlen: int) -> Tensor:
        shape = (case.batch, num_heads, seqlen, case.head_dim)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, grad_out = (draw(case.num_heads_q, case.seqlen_q) for _ in range(2))
    k, v = (draw(case.num_heads_kv, case.seqlen_kv) for _ in range(2))
    return exact.Inputs(q, k, v, grad_out, case.causal)


def gate(errors: dict[str, float]) -> dict[str, float]:
    """Raises ValueError when a result is wrong: it is then not timed."""
    if not exact.within_limit(list(errors.values())):
        raise ValueError(f"wrong result, not timed: relative errors {errors}")
    return errors


def run_forward(inputs: exact.Inputs, call: Attention) -> tuple[Tensor, list[Tensor]]:
    """Output with its graph, and the leaves q, k, v."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    return call(q, k, v), leaves


def check_forward(inputs: exact.Inputs, call: Attention) -> dict[str, float]:
    return gate({"out": exact.forward_error(inputs, call(inputs.q, inputs.k, inputs.v))})


def check_backward(inputs: exact.Inputs, call: Attention) -> dict[str, float]:
    """Empty where a float32 reference of the gradients would take too long."""
    if inputs.q.shape[2] * inputs.k.shape[2] * inputs.group > exact.MAX_GRADIENT_SCORES:
        return {}
    out, leaves = run_forward(inputs, call)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    return gate(dict(zip(("dq", "dk", "dv"), exact.gradient_errors(inputs, grads), strict=True)))


def time_forward(case: PeerCase, inputs: exact.Inputs, call: Attention) -> dict[str, Any]:
    times = timing.time_call(lambda: call(inputs.q, inputs.k, inputs.v))
    row: dict[str, Any] = {"forward": asdict(times)}
    if case.is_decode:
        row["terabytes_per_second"] = case.kv_bytes / times.median_ms / 1e9
    else:
        row["forward_tflops"] = case.forward_flops / times.median_ms / 1e9
    return row


def time_backward(case: PeerCase, inputs: exact.Inputs, call: Attention) -> dict[str, Any]:
    out, leaves = run_forward(inputs, call)
    times = timing.time_call(
        lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)
    )
    return {
        "backward": asdict(times),
        "backward_tflops": case.backward_flops / times.median_ms / 1e9,
    }


def measure(case: PeerCase, inputs: exact.Inputs, peer: Peer) -> dict[str, Any]:
    """Errors and times of one peer; where it fails, the text of its error and what came before."""
    row: dict[str, Any] = {"peer": peer.name}
    try:
        call = peer.make(case)
        row["errors"] = check_forward(inputs, call)
        row |= time_forward(case, inputs, call)
        if case.backward:
            row["errors"] |= check_backward(inputs, call)
            row |= time_backward(case, inputs, call)
    except CALL_ERRORS as error:
        row["error"] = f"{type(error).__name__}: {error}"[:600]
    torch.cuda.empty_cache()
    return row


def measure_rope(case: PeerCase) -> dict[str, Any]:
    """The unfused rotation of q and k, compiled, forward and with its gradient."""
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    cos, sin = rotary_tables(case.seqlen_q, case.head_dim, "cuda")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k: (rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin)),
        dynamic=False,
    )
    row: dict[str, Any] = {"case": case.label, "peer": "rope_compiled"}
    try:
        row["forward"] = asdict(timing.time_call(lambda: compiled(inputs.q, inputs.k)))
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k)]
        rotated = compiled(*leaves)
        grads = [torch.randn_like(x) for x in rotated]
        row["backward"] = asdict(
            timing.time_call(lambda: torch.autograd.grad(rotated, leaves, grads, retain_graph=True))
        )
    except CALL_ERRORS as error:
        row["error"] = f"{type(error).__name__}: {error}"[:600]
    return row


def rate_text(row: dict[str, Any]) -> str:
    """TB/s of a decode; TFLOP/s forward/backward otherwise; "-" for what a peer does not do."""
    if "terabytes_per_second" in row:
        return f"{row['terabytes_per_second']:.2f}"
    forward, backward = (
        f"{row[key]:.0f}" if key in row else "-" for key in ("forward_tflops", "backward_tflops")
    )
    return f"{forward}/{backward}"


class Session:
    """Measures until the time is up and keeps what it could not reach by name."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.data: dict[str, Any] = {"copy": None, "rows": [], "rope": [], "unmeasured": []}
        self.inputs: tuple[PeerCase, exact.Inputs] | None = None

    def has_time_for(self, name: str) -> bool:
        if self.context.remaining() >= RESERVE_SECONDS:
            return True
        self.data["unmeasured"].append(name)
        return False

    def save(self) -> None:
        self.context.save(Outcome(RUNNING, self.data, []))

    def measure_peers(self, peers: list[Peer]) -> None:
        for case in [*attention_cases(), *decode_cases()]:
            for peer in peers:
                if self.has_time_for(f"{case.label}: {peer.name}"):
                    row = measure(case, self.inputs_of(case), peer)
                    self.data["rows"].append({"case": case.label, **asdict(case), **row})
                    self.save()

    def measure_rope(self) -> None:
        for case in rope_cases():
            if self.has_time_for(f"{case.label}: rope_compiled"):
                self.data["rope"].append(measure_rope(case))
                self.save()

    def inputs_of(self, case: PeerCase) -> exact.Inputs:
        if self.inputs is None or self.inputs[0] != case:
            self.inputs = None  # frees the last case's tensors before the next are drawn
            self.inputs = (case, make_inputs(case, "cuda", torch.bfloat16))
        return self.inputs[1]


def table(data: dict[str, Any]) -> list[str]:
    """One line a shape, one column a peer; the error texts stay in the JSON."""
    names = [peer.name for peer in PEERS]
    by_case: dict[str, dict[str, str]] = {}
    for row in data["rows"]:
        by_case.setdefault(row["case"], {})[row["peer"]] = rate_text(row)
    heading = f"{'TFLOP/s fwd/bwd, decode TB/s':30}"
    lines = [heading + "".join(f"{name:>13}" for name in names)]
    for label, rates in by_case.items():
        lines.append(f"{label:30}" + "".join(f"{rates.get(name, ''):>13}" for name in names))
    for row in data["rope"]:
        times = [
            f"{1e3 * row[key]['median_ms']:.0f}" for key in ("forward", "backward") if key in row
        ]
        lines.append(f"{row['case']:30} rope, compiled: {' / '.join(times) or '-'} us")
    if data["unmeasured"]:
        lines.append(f"{len(data['unmeasured'])} not reached in time")
    return lines


def dry_run() -> Outcome:
    """The table of cases, and the gate run on the CPU at three small shapes."""
    cases = [*attention_cases(), *decode_cases()]
    small = [
        PeerCase(1, 4, 2, 48, 48, 16, causal=True, backward=True),
        PeerCase(2, 4, 4, 32, 32, 16, causal=False, backward=True),
        PeerCase(2, 4, 2, 1, 64, 16, causal=False, backward=False),
    ]
    checks = []
    for case in small:
        inputs = make_inputs(case, "cpu", torch.float32)

        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = case.causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        errors = check_forward(inputs, call)
        errors |= check_backward(inputs, call) if case.backward else {}
        checks.append({"case": case.label, "errors": errors})
    data = {
        "cases": [asdict(case) for case in cases],
        "rope_cases": [asdict(case) for case in rope_cases()],
        "peers": [peer.name for peer in PEERS],
        "gate": checks,
    }
    lines = [f"{len(cases)} shapes, {len(rope_cases())} rope shapes, {len(PEERS)} peers"]
    return Outcome(NOT_MEASURED, data, lines, "dry run: only the gate was run, on the CPU")


def run(context: Context) -> Outcome:
    if context.dry_run:
        return dry_run()
    if not machine.gpu_fields():
        return Outcome(FAILED, {}, [], "nvidia-smi finds no GPU")
    session = Session(context)
    session.data["copy"] = timing.copy_bandwidth(COPY_BYTES)
    flex = [peer for peer in PEERS if peer.name == "flex"]
    session.measure_peers([peer for peer in PEERS if peer not in flex])
    session.measure_rope()
    session.measure_peers(flex)  # last: it compiles at every shape
    data = session.data
    lines = [f"copy {data['copy']['terabytes_per_second']:.2f} TB/s", *table(data)]
    if not any("forward" in row for row in data["rows"]):
        return Outcome(FAILED, data, lines, "no peer could be measured")
    return Outcome(OK, data, lines)
