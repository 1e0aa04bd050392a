#!/usr/bin/env bash
# Runs the tests of our exports through llama.cpp, which it puts, compiled, beside the environment
# under build/: tools/llama_cpp.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
root=$PWD/build/llama.cpp
package=llama-cpp-python==0.3.36
# Beside the environment, so that nothing there changes; without dependencies, which it has.
pip() { "$python" -m pip "$1" -q --no-deps "${@:2}"; }

if [ ! -f "$root/source/convert_hf_to_gguf.py" ]; then
  pip download --no-binary llama-cpp-python -d "$root" $package
  mkdir -p "$root/source"
  tar xzf "$root"/llama_cpp_python-*.tar.gz -C "$root/source" --strip-components 3 --wildcards \
    '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' \
    '*/vendor/llama.cpp/gguf-py/*' '*/vendor/llama.cpp/LICENSE'
fi
if [ ! -d "$root/site/llama_cpp" ]; then
  echo "compiling $package (log: build/llama.cpp/log.txt)"
  CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install --target "$root/partial" \
    "$root"/llama_cpp_python-*.tar.gz sentencepiece diskcache > "$root/log.txt" 2>&1 ||
    (tail -n 40 "$root/log.txt"; false)
  mv "$root/partial" "$root/site"
fi
exec "$python" -m pytest tests/hf/test_gguf*.py -q -p no:cacheprovider
