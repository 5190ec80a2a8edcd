#!/usr/bin/env bash
# Builds the package for a Hopper GPU, tests it on the device, looks for bad accesses and races, and measures, in under
# nine minutes:   benchmarks/run_on_gpu.sh OUTPUT_FOLDER
# Needs nothing from a network: Python with torch, pybind11, scikit-build-core, cmake and ninja, and CUDA's compiler and
# compute-sanitizer, must be there. Every step leaves a log in the folder; steps go on after one that failed.
# MUDSC_CUDA_ARCHITECTURES names other devices.
set -u
output=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$output/site
failed=()

step() {  # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  local begin=$SECONDS left=$((530 - SECONDS))
  ((seconds > left)) && seconds=$((left > 1 ? left : 1))
  if timeout "$seconds" "$@" >"$output/$name.log" 2>&1; then
    echo "$name: passed in $((SECONDS - begin)) s"
  else
    echo "$name: FAILED after $((SECONDS - begin)) s; the end of its log:"
    tail -n 15 "$output/$name.log"
    failed+=("$name")
  fi
}

export MAX_JOBS=16 CMAKE_BUILD_PARALLEL_LEVEL=16 MUDSC_CUDA=ON
step build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" . \
  --config-settings=cmake.define.MUDSC_CUDA_ARCHITECTURES="${MUDSC_CUDA_ARCHITECTURES:-90a-real}" \
  --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON
export PYTHONPATH=$site

step info 30 "$python" -m mudsc_fast info
cat "$output/info.log"
step tests_on_device 150 "$python" -m pytest -m gpu -q -x tests/kernels
# The whole suite but for what needs packages from a network; in parallel where pytest-xdist is there.
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 12)
step tests 150 "$python" -m pytest -q "${parallel[@]}" -W default tests/kernels tests/test_dispatch.py tests/test_merge.py \
  tests/test_matching.py tests/test_golden_networks.py
small="assignment and on_a_device and uniform and (shape0 or shape1) or zip and on_a_device and correlation and 16"
for tool in memcheck racecheck; do
  step "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu -k "$small" \
    tests/kernels
done
rm -rf "$output/measured" && mkdir -p "$output/measured"
MUDSC_BENCHMARK_SECONDS=100 PYTHONPATH=$site:benchmarks \
  step benchmarks 150 "$python" benchmarks/bench_cuda.py "$output/measured"
cat "$output/measured/cuda.md" 2>/dev/null
step bench_correlation 90 "$python" -m pytest -q -s --benchmark-only benchmarks/bench_correlation.py
grep "^C = " "$output/bench_correlation.log"
rm -rf "$site"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
