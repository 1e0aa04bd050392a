#!/usr/bin/env bash
# Runs the tests of the Triton kernels with other versions of Triton than the pinned one, each put
# beside the environment under build/: tools/triton_versions.sh [PYTHON] [VERSION...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true
versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then versions=(3.7.1 3.8.0 3.9.0); fi

status=0
for version in "${versions[@]}"; do
  site=$PWD/build/triton-$version
  if [ ! -d "$site/triton" ]; then
    "$python" -m pip install -q --no-deps --target "$site" "triton==$version"
  fi
  echo "triton $(PYTHONPATH=$site "$python" -c 'import triton; print(triton.__version__)')"
  # What else the tests do with Triton does not depend on its version.
  PYTHONPATH=$site "$python" -m pytest -q -p no:cacheprovider -m "not slow" \
    tests/backends/triton tests/backends/test_triton.py tests/support/test_interpreter.py \
    tests/test_attention.py tests/test_attention_varlen.py tests/test_decode.py \
    -k "triton or test_interpreter" || status=1
done
exit $status
