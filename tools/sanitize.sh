#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer beside the normal one
# and runs the kernel tests on it: tools/sanitize.sh [PYTHON] [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true
build=$PWD/build/sanitize
site=$build/site
bin=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH=$bin:$PATH

# A package of links to our Python files around the instrumented module.
mkdir -p "$site/drope_kernels"
find "$site/drope_kernels" -type l -delete
for file in drope_kernels/*; do
  case $file in *.so | */__pycache__) ;; *) ln -s "$PWD/$file" "$site/$file" ;; esac
done

cmake -S . -B "$build" -G Ninja -DDROPE_SANITIZE=ON -DDROPE_CUDA=OFF \
  -DDROPE_OUTPUT_DIR="$site/drope_kernels" -DPython_EXECUTABLE="$bin/python3" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > "$build/configure.txt" \
  || { cat "$build/configure.txt"; exit 1; }
cmake --build "$build"

# Python itself is not instrumented, so the runtime comes in by preload; libstdc++ with it, or its
# exceptions would be thrown past the interceptors. Leaks: Python's own are not ours to report.
preload="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)"
export PYTHONPATH=$site
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$preload "$python" -P - <<'CHECK'
import drope_kernels
assert drope_kernels.build_info()["sanitizers"], "not the instrumented module was imported"
CHECK
# The cases of every backend, of which -k picks the compiled one's, and that backend's own tests.
shopt -s nullglob
arguments=("$@")
if [ ${#arguments[@]} -eq 0 ]; then
  arguments=(tests/test_attention.py tests/test_attention_varlen.py tests/test_decode.py)
  arguments+=(tests/backends/cpu tests/backends/test_cpu.py tests/call/test_interop.py)
  arguments+=(-k "cpu or interop" -m "not slow")
fi
# pytest's own paths would put the repository's package first.
LD_PRELOAD=$preload exec "$bin/pytest" -q -p no:cacheprovider \
  -o pythonpath="$site tests/support tests tools" "${arguments[@]}"
