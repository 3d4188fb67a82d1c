#!/usr/bin/env bash
# On a CUDA machine with torch, Triton, numpy, safetensors, filelock, pytest and pytest-benchmark: build from source,
# run the GPU tests, then the benches of losses, augmentation and loop; leave bench/results/<bench>-<device>.{json,md}.
# Downloads nothing and ends within 9 minutes: a part that is cut off leaves what it has measured, and its table
# names the rest. A failure fails the script, after everything else has run.
#
#   PYTHON=python3 bench/gpu.sh [tests] [losses] [augment] [loop] [profile]     (default: all of them)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
unset TRITON_INTERPRET
mkdir -p build

parts=" ${*:-tests losses augment loop profile} "
for part in $parts; do
    case $part in tests | losses | augment | loop | profile) ;; *)
        echo "bench/gpu.sh: there is no part $part; see the head of the script" >&2
        exit 2
        ;;
    esac
done
wanted() { [[ $parts == *" $1 "* ]]; }

capability=$("$PYTHON" - <<'END'
import sys
try:
    import filelock, numpy, pytest, pytest_benchmark, safetensors, torch, triton
except ImportError as error:
    sys.exit(f"bench/gpu.sh: {sys.executable}: {error}; set PYTHON to one with all that this script's head names")
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: torch sees no CUDA device; run it on a machine with one, with a torch built for CUDA")
print("%d%d" % torch.cuda.get_device_capability())
END
) || exit 2
# Only for the device that is here.
export CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$capability-real ${CMAKE_ARGS:-}"

# Runs a command for at most so many seconds, and not beyond 500 from the start; then it gets the SIGNAL, and half a
# minute to write what it has: a compiler does not stop at once.
within() {
    local limit=$1 left=$((500 - SECONDS))
    shift
    timeout -s "${SIGNAL:-TERM}" -k 30 $((left < 1 ? 1 : left < limit ? left : limit)) "$@"
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
    return $status
}

bench() {
    local json=build/bench-$1.json
    wanted "$1" || return
    rm -f "$json"
    measure "$2" "$PYTHON" -m pytest -vv "bench/test_$1.py" --benchmark-enable --benchmark-json="$json" -k cuda
    if [ $? -eq 124 ] && [ ! -s "$json" ]; then
        echo "$1: the time was up before anything was measured"
        return
    fi
    "$PYTHON" -m bench.report "$json" || failed=1
}

# What the bench of the losses compiles, a case after the other, takes longer than its measurements. Here three
# processes do so beside the tests, into the caches.
if wanted losses && "$PYTHON" -c 'import xdist' 2> /dev/null; then
    TORCHINDUCTOR_COMPILE_THREADS=4 within 190 "$PYTHON" -m pytest -n 3 bench/test_losses.py -k cuda \
        > build/compiled.log 2>&1 &
fi

if wanted tests; then
    # Side by side where pytest-xdist is, for they compile some 300 kernels; without the fixtures of the whole
    # suite, which need more packages. The log names every test as it ends, also if the time is up before.
    options=()
    "$PYTHON" -c 'import xdist' 2> /dev/null && options+=(-n 8)
    "$PYTHON" -c 'import pytest_timeout' 2> /dev/null && options+=(--timeout 60)
    log=build/gpu-tests.log
    OMP_NUM_THREADS=1 SIGNAL=INT within 190 "$PYTHON" -m pytest --noconftest -vv "${options[@]}" \
        tests/test_{draw,stacked,graph,footprint,on_gpu,augment_cuda}.py \
        tests/test_{normalisation_kernels,first_block_kernels,grad_weight_kernels,kernels,fused_losses,launch}.py \
        > $log 2>&1 || failed=1
    echo "$log: $(grep -c ' PASSED\|PASSED ' $log) passed"
    grep -E '^E  |FAILED|ERROR' $log | sort -u | head -50
    tail -n 1 $log
fi
wait
bench losses 100
bench augment 50
bench loop 140
wanted profile && measure 20 "$PYTHON" -m bench.profile --method dm
exit $failed
