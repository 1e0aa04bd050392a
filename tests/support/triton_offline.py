"""The Triton kernels as a GPU would get them, without a GPU: `python triton_offline.py ...`.

Launchers run on tensors of torch's meta device, which have shapes and no values; Triton specialises
and, if asked, compiles the kernels for the architecture named; what would start is recorded.

    triton_offline.py compile ARCHITECTURE CALL...    and reports what the compiler made of them
    triton_offline.py launch ARCHITECTURE CALL...     compiles nothing

Writes one JSON object. "calls" has a list for each CALL, a name of `triton_calls`: the launches,
with the label of the kernel and the grid. "kernels" says of each label what was specialised.
`offline` runs it from a test, in whose own process Triton interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton_calls
from repository import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from drope_kernels.backends.triton import TritonBackend, launch

CACHE = ROOT / "build" / "triton-cache"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")
PRODUCT = re.compile(r"= tt\.dot .* : tensor<(\d+)x\d+x(\w+)> \*")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@cache
def offline(action: str, architecture: int, *names: str) -> dict[str, Any]:
    """What this file writes when it runs as a program."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(CACHE)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, action, str(architecture), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(done.stdout)
    return results


class NoHost(TorchDispatchMode):
    """Refuses tensors of the host: what they hold would have to be copied in every call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor) and x.device.type == "cpu":
                raise AssertionError(f"{func}: a tensor on the host, {tuple(x.shape)}")
        return result


class OfflineDriver:
    """What Triton asks of its driver before it starts a kernel."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class OfflineKernel:
    """What a specialised kernel is to Triton: something to run on a grid."""

    function = packed_metadata = None

    def __init__(self, recorder: Recorder, key: str) -> None:
        self.recorder = recorder
        self.key = key

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.recorder.launches.append({"kernel": self.key, "grid": arguments[:3]})


class Recorder:
    """Stands in for Triton's compiler and launcher."""

    def __init__(self, architecture: int, *, compiles: bool) -> None:
        self.compiles = compiles
        self.kernels: dict[str, dict[str, Any]] = {}
        self.launches: list[dict[str, Any]] = []
        driver.set_active(OfflineDriver(architecture))
        launch.architecture_of = lambda x: architecture  # before launchers import it
        recorder = self

        def specialise(function: JITFunction[Any], *given: Any) -> OfflineKernel:
            return recorder.specialise(function, *given)

        JITFunction._do_compile = specialise

    def specialise(
        self,
        function: JITFunction[Any],
        key: Any,
        signature: Any,
        device: int,
        constants: dict[tuple[int, ...], Any],
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> OfflineKernel:
        name = function.fn.__name__
        label = f"{name}-{sum(one['name'] == name for one in self.kernels.values())}"
        named = {function.arg_names[path[0]]: x for path, x in constants.items() if len(path) == 1}
        about = {name: x for name, x in named.items() if name.isupper()}
        about["tma"] = "tensordesc" in str(signature)
        about |= {"name": name, "warps": options.num_warps, "stages": options.num_stages}
        if self.compiles:
            source = ASTSource(function, signature, constants, attributes)
            target = driver.active.get_current_target()
            about |= report(triton.compile(source, target=target, options=options.__dict__))
        self.kernels[label] = about
        kernel = OfflineKernel(self, label)
        function.device_caches[device][0][key] = kernel
        return kernel


def report(compiled: Any) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory, products of tiles, counts of instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = RESOURCES.search(output_of("cuobjdump", "-res-usage", file.name))
        sass = output_of("nvdisasm", "-c", file.name)
    assert resources
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.M))
    return {
        "registers": int(resources[1]),
        "stack": int(resources[2]),
        "shared": compiled.metadata.shared,
        "products": [(int(rows), dtype) for rows, dtype in PRODUCT.findall(compiled.asm["ttir"])],
        "instructions": {opcode: opcodes[opcode] for opcode in COUNTED},
    }


def output_of(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    action, architecture, *names = sys.argv[1:]
    recorder = Recorder(int(architecture), compiles=action == "compile")
    backend = TritonBackend("meta", name="offline-triton")
    calls = {}
    for name in names:
        recorder.launches = []
        step = triton_calls.prepare(name, backend)
        with NoHost():
            step()
        calls[name] = recorder.launches
    json.dump({"calls": calls, "kernels": recorder.kernels}, sys.stdout)


if __name__ == "__main__":
    main()
