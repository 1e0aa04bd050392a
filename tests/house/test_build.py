"""What the build promises: facts about itself, no torch or CUDA in the binary, a console script."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import drope_kernels
from drope_kernels import _C
from drope_kernels.build import cuda_unavailable_reason
from drope_kernels.cli import main


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_build_info_states_every_fact() -> None:
    info = drope_kernels.build_info()
    assert set(info) == {
        *("version", "commit", "compiler", "build_type", "sanitizers"),
        *("cpu_isas", "cuda", "cuda_architectures", "no_cuda_reason"),
    }
    assert re.fullmatch(r"unknown|[0-9a-f]{7,40}(-dirty)?", info["commit"])
    assert re.match(r"\w+ \d+", info["compiler"])
    assert info["cpu_isas"][0] == "scalar"
    if info["cuda"] is None:
        assert info["cuda_architectures"] == []
        assert info["no_cuda_reason"]
    else:
        assert re.match(r"\d+\.\d+", info["cuda"])
        assert info["cuda_architectures"][0].startswith("sm_")
        assert info["no_cuda_reason"] is None


def test_version_says_what_it_was_built_for() -> None:
    declared = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text())
    assert declared is not None
    cuda = drope_kernels.build_info()["cuda"]
    label = "cpu" if cuda is None else "cu" + "".join(cuda.split(".")[:2])
    assert drope_kernels.__version__ == f"{declared[1]}+{label}"
    # The label of the package's metadata is that of the last install, not of the last build.
    assert importlib.metadata.version("drope_kernels").split("+")[0] == declared[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the module with ldd")
def test_binary_needs_neither_torch_nor_cuda() -> None:
    libraries = run("ldd", _C.__file__).stdout
    assert "libstdc++" in libraries
    assert not re.search(r"torch|libc10|libcuda|libgomp|libiomp", libraries)


def test_module_imports_alone() -> None:
    """Without torch in the process: the binary knows pointers, not tensors."""
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "assert 'torch' not in sys.modules; print(module.build_info()['version'])"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == drope_kernels.__version__


def test_only_the_module_init_function_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    exported = run(nm, "-D", "--defined-only", _C.__file__).stdout
    # With CUDA's runtime inside: torch brings its own, and neither may answer for the other.
    ours = [line for line in exported.splitlines() if re.search("drope|cuda", line)]
    assert "PyInit__C" in exported
    assert ours == []


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_no_function_of_one_isa_can_replace_that_of_another(isa: str) -> None:
    """The linker keeps one copy of equal weak symbols: each must carry its ISA in its name."""
    nm = shutil.which("nm")
    objects = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
    compiled = objects / "drope_csrc.dir" / "csrc" / "cpu" / f"attention_{isa}.cpp.o"
    if nm is None or not compiled.exists():
        pytest.skip("needs nm and the objects of a build in this tree")
    weak = [line for line in run(nm, "-C", compiled).stdout.splitlines() if " W " in line]
    assert [line for line in weak if f"drope::{isa}::" not in line] == []


def test_every_public_name_exists_and_is_documented() -> None:
    assert _C.__doc__
    for name in drope_kernels.__all__:
        assert inspect.getdoc(getattr(drope_kernels, name)), name


def test_drope_info_prints_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for fact in (
        *(drope_kernels.__version__, drope_kernels.build_info()["compiler"], "reference"),
        cuda_unavailable_reason() or f"cuda                {drope_kernels.build_info()['cuda']}",
    ):
        assert fact in printed


def test_drope_info_prints_what_is_wrong_with_the_isa(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPE_CPU_ISA", "sse9")
    _C.set_cpu_isa("")
    assert main(["info"]) == 1
    monkeypatch.undo()
    _C.set_cpu_isa("")
    assert "DROPE_CPU_ISA: expected one of" in capsys.readouterr().out


def test_a_tree_without_the_compiled_module_says_how_to_build_it(tmp_path: Path) -> None:
    package = tmp_path / "drope_kernels"
    shutil.copytree(ROOT / "drope_kernels", package, ignore=shutil.ignore_patterns("_C*", "demo"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # An editable install would find the compiled module elsewhere.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import drope_kernels"
    )
    result = run(sys.executable, "-P", "-c", code)
    assert result.returncode != 0
    assert "No module named 'drope_kernels._C'" in result.stderr
    assert "pip install ." in result.stderr


def test_a_cpu_build_says_why_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    info = drope_kernels.build_info() | {"cuda": None, "no_cuda_reason": "no nvcc was found"}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    reason = cuda_unavailable_reason()
    assert reason is not None
    assert "built without CUDA kernels: no nvcc was found; DROPE_CUDA=ON" in reason
    assert main(["info"]) == 0


def test_drope_without_a_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "info" in capsys.readouterr().err
