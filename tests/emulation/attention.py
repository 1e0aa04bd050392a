"""The CUDA backend on the emulator: same bindings, host code and kernels, tensors of the CPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drope_kernels.backends.cuda import CudaBackend
from drope_kernels.call import dispatch

from .library import (
    AT_ISSUE,
    COMMON,
    COMPILER,
    FOLDER,
    HEADERS,
    HOST_FLAGS,
    KERNEL_FLAGS,
    ROOT,
    Emulator,
    Job,
    Texts,
    build_runtime,
    compile_all,
    digest,
    included,
    link,
    read,
    rewritten_jobs,
    write_tree,
)

HOST = tuple(sorted((ROOT / "csrc/cuda").glob("*.cpp")))
INSTANTIATIONS = tuple(sorted((ROOT / "csrc/cuda/attention/instantiations").glob("*.cu")))
BINDINGS = (
    FOLDER / "bindings/module.cpp",
    *sorted((ROOT / "python_bindings").glob("cuda_attention_*.cpp")),
    ROOT / "python_bindings/cuda.cpp",
)
BINDING_FLAGS = [
    *COMMON,
    *("-O1", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'python_bindings'}"),
    *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]),
]


def binding_jobs() -> list[Job]:
    """One source that includes all bindings: most of their compilation is pybind11's headers."""
    texts = read([*HEADERS, *BINDINGS, *(ROOT / "python_bindings").glob("*.h")])
    used = sorted({*BINDINGS, *(path for one in BINDINGS for path in included(one, texts))})
    together = "".join(f'#include "{path}"\n' for path in BINDINGS)
    common = [COMPILER, pybind11.__version__, *BINDING_FLAGS, together]
    source = write_tree({Path("bindings.cpp"): together}) / "bindings.cpp"
    return [(source, BINDING_FLAGS, digest([*common, *(texts[path] for path in used)]))]


def build_module(replaced: Texts | None = None, kernels: tuple[Path, ...] = ()) -> Path:
    """The library of the module emulated_cuda.

    replaced: text in place of that of a source or header, in `kernels`, some of INSTANTIATIONS;
    the others are built as they are.
    """
    changed = rewritten_jobs(kernels, replaced or {}, KERNEL_FLAGS)
    rest = [path for path in INSTANTIATIONS if path not in kernels]
    jobs = [
        *changed,
        *rewritten_jobs(rest, {}, KERNEL_FLAGS),
        *rewritten_jobs(HOST, {}, HOST_FLAGS),
        *binding_jobs(),
    ]
    return link("emulated_cuda", compile_all(jobs), [build_runtime()])


def load_module(path: Path) -> ModuleType:
    name = f"{path.stem}.emulated_cuda"  # pybind11 takes two of one name for the same module
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# ---- memory ------------------------------------------------------------------------------------
class DeviceMemory(TorchDispatchMode):
    """Lends the storages of the tensors that a launch is given and makes to the emulated device."""

    def __init__(self, emulator: Emulator, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.library = emulator.library
        self.lent: list[int] = []
        for tensor in tensors:
            self.lend(tensor)

    def lend(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0:
            self.library.emulation_lend(storage.data_ptr(), storage.nbytes())
            self.lent.append(storage.data_ptr())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.lend(result)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for address in self.lent:
            self.library.emulation_take_back(address)


# ---- the backend -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Architecture:
    """What the emulated device says it is. Few processors, so that persistent kernels go round."""

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    num_sms: int = 4


SM80 = Architecture("emulated-sm80", (8, 0), 166912)
SM86 = Architecture("emulated-sm86", (8, 6), 101376)
SM90A = Architecture("emulated-sm90a", (9, 0), 232448)


class EmulatedBackend(CudaBackend):
    """CudaBackend on an emulated device and tensors of the CPU.

    deterministic: of backward; None: what torch asks for.
    counts: operations of the last launch; `launches` has those of all, until it is cleared.
    """

    def __init__(self, module: ModuleType, emulator: Emulator, architecture: Architecture) -> None:
        super().__init__(module, device_type="cpu", name=architecture.name)
        self.emulator = emulator
        self.architecture = architecture
        self.completion, self.seed = AT_ISSUE, 1
        self.deterministic: bool | None = None
        self.counts: dict[str, int] = {}
        self.launches: list[tuple[str, dict[str, int]]] = []
        self.be_the_device()
        assert self.unavailable() is None

    def be_the_device(self) -> None:
        one = self.architecture
        self.emulator.set_device(one.capability, one.num_sms, one.shared_bytes)

    def launch(self, function: str, arguments: dict[str, Any], tensors: list[Tensor]) -> None:
        self.emulator.configure(self.completion, self.seed)
        self.be_the_device()
        if self.deterministic is not None:
            arguments["deterministic"] = self.deterministic
        try:
            with DeviceMemory(self.emulator, tensors):
                super().launch(function, arguments, tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {self.emulator.error()}") from error
        self.counts = self.emulator.counts()
        self.launches.append((function, self.counts))


def load_backends(path: Path, *architectures: Architecture) -> list[EmulatedBackend]:
    module, emulator = load_module(path), Emulator.load(path)
    return [EmulatedBackend(module, emulator, one) for one in architectures]


@contextmanager
def registered(*backends: EmulatedBackend) -> Iterator[None]:
    """Calls may ask for the backends by their names; "auto" never takes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_registered", {one.NAME: one for one in backends})
        yield


@contextmanager
def emulated(
    backend: EmulatedBackend,
    completion: int = AT_ISSUE,
    seed: int = 1,
    *,
    deterministic: bool | None = None,
) -> Iterator[EmulatedBackend]:
    """Calls inside run in this completion mode."""
    settings = ("completion", "seed", "deterministic")
    before = [getattr(backend, name) for name in settings]
    for name, value in zip(settings, (completion, seed, deterministic), strict=True):
        setattr(backend, name, value)
    try:
        yield backend
    finally:
        for name, value in zip(settings, before, strict=True):
            setattr(backend, name, value)
