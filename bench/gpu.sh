#!/usr/bin/env bash
# On a CUDA machine with torch, Triton and pytest: build from source, run the GPU tests and the benches, leave
# bench/results/<device>.{json,md}. Downloads nothing; stops within 9 minutes. A failed test fails the script,
# after the benches.
#
#   PYTHON=python3 bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
unset TRITON_INTERPRET

"$PYTHON" -c 'import sys, torch, triton
sys.exit(None if torch.cuda.is_available() else "bench/gpu.sh: torch sees no CUDA device")' || exit 2

# Without cmake, ninja or pybind11 the extension stays out; the losses need none of it.
if ! timeout 100 "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . ; then
    MIM4DD_NO_EXT=1 "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . || exit 2
fi

failed=0
# Without the settings and fixtures of the whole suite, which need more packages.
timeout 170 "$PYTHON" -m pytest --noconftest -o addopts= -q tests/test_kernels.py || failed=1
timeout 260 "$PYTHON" -m bench.losses --seconds 180 || failed=1
exit $failed
