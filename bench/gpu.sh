#!/usr/bin/env bash
# On a CUDA machine with torch, Triton, pytest and pytest-benchmark: build from source, run the GPU tests, then
# the benches of the loop, the augmentation and the losses; leave bench/results/<bench>-<device>.{json,md}.
# Downloads nothing and ends within 9 minutes: a part that is cut off leaves what it has measured, and its table
# names the rest. A failure fails the script, after everything else has run.
#
#   PYTHON=python3 bench/gpu.sh [tests] [loop] [augment] [losses] [profile]     (default: all of them)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
unset TRITON_INTERPRET
mkdir -p build

parts=" ${*:-tests loop augment losses profile} "
for part in $parts; do
    case $part in tests | loop | augment | losses | profile) ;; *)
        echo "bench/gpu.sh: there is no part $part; see the head of the script" >&2
        exit 2
        ;;
    esac
done
wanted() { [[ $parts == *" $1 "* ]]; }

capability=$("$PYTHON" - <<'END'
import sys
try:
    import pytest, pytest_benchmark, torch, triton
except ImportError as error:
    sys.exit(f"bench/gpu.sh: {sys.executable}: {error}; set PYTHON to one with torch, triton, pytest, pytest-benchmark")
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: torch sees no CUDA device; run it on a machine with one, with a torch built for CUDA")
print("%d%d" % torch.cuda.get_device_capability())
END
) || exit 2
# Only for the device that is here.
export CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$capability-real ${CMAKE_ARGS:-}"

# Runs a command for at most so many seconds, and not beyond 520 from the start; then it gets the SIGNAL.
within() {
    local limit=$1 left=$((520 - SECONDS))
    shift
    timeout -s "${SIGNAL:-TERM}" -k 10 $((left < 1 ? 1 : left < limit ? left : limit)) "$@"
}

# Without an nvcc of torch's version there is no CUDA half, without cmake, ninja or pybind11 no extension at all.
install=("$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e .)
within 100 "${install[@]}" || MIM4DD_CUDA=0 within 60 "${install[@]}" ||
    MIM4DD_NO_EXT=1 within 30 "${install[@]}" || exit 2

failed=0
# Runs a measurement; that its time was up (124) is no failure, for it leaves what it has.
measure() {
    local status
    within "$@"
    status=$?
    [ $status -eq 0 ] || [ $status -eq 124 ] || failed=1
}

bench() {
    local json=build/bench-$1.json
    wanted "$1" || return
    rm -f "$json"
    measure "$2" "$PYTHON" -m pytest "bench/test_$1.py" --benchmark-enable --benchmark-json="$json" -k cuda
    "$PYTHON" -m bench.report "$json" || failed=1
}

if wanted tests; then
    # Side by side where pytest-xdist is, for they compile some 300 kernels; without the fixtures of the whole
    # suite, which need more packages. Interrupted, pytest says what has failed by then.
    "$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 8) || workers=()
    SIGNAL=INT within 230 "$PYTHON" -m pytest --noconftest "${workers[@]}" \
        tests/test_{graph,stacked,on_gpu,augment_cuda,draw,normalisation_kernels,first_block_kernels,kernels}.py || failed=1
fi
bench loop 150
bench augment 60
bench losses 90
wanted profile && measure 30 "$PYTHON" -m bench.profile --method dm
exit $failed
