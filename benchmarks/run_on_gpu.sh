#!/usr/bin/env bash
# Builds the package for a Hopper GPU, tests it there, looks for bad accesses and races, and measures, in under nine
# minutes:
#
#   benchmarks/run_on_gpu.sh OUTPUT_FOLDER
#
# Needs nothing from a network: Python with torch, triton, pytest, pybind11, scikit-build-core, cmake and ninja, CUDA's
# compiler and compute-sanitizer must be there. PYTHON names another python3, MUDSC_CUDA_ARCHITECTURES other devices.
#
# The folder receives summary.txt (a line for each step, and what went wrong), log.txt (all output), cuda.json and
# cuda.md (the measurements). Every test function has a process of its own, so that one that hangs or loses the device
# takes no other along. A step in which no test ran has failed. The status is 0 if all steps passed.
set -uo pipefail

readonly TESTS_END=340 END=525 # seconds from the start
readonly POOL=10               # steps at a time while nothing is measured

output=$(mkdir -p "${1:?usage: $0 OUTPUT_FOLDER}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
rm -f "$output"/{summary.txt,log.txt,cuda.json,cuda.md}
python=${PYTHON:-python3}
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer; do
  [[ -d $folder ]] && PATH=$PATH:$folder
done
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR=$scratch/triton
ends=$TESTS_END

note() { printf '%s\n' "$*" | tee -a "$output/summary.txt"; }

# What went wrong, from a log: what pytest and compute-sanitizer say first, or else its end.
reasons() {
  local found
  found=$(
    grep -aE '^(E  |=+ (Invalid|Error|Warning|Barrier|.*hazard))' "$1" | head -n 5
    grep -aE '^(FAILED|ERROR) ' "$1" | head -n 7
  )
  printf '%s\n' "${found:-$(tail -n 8 "$1")}" | cut -c 1-200 | sed 's/^/    /'
}

keep_log() { # name, file: adds it to log.txt, of a very long one its ends
  {
    flock 9
    printf '\n##### %s\n' "$1"
    if (($(stat -c %s "$2") > 400000)); then
      head -c 200000 "$2" && printf '\n... (left out) ...\n' && tail -c 200000 "$2"
    else
      cat "$2"
    fi
  } >>"$output/log.txt" 9>>"$scratch/lock"
}

# step NAME SECONDS COMMAND...: runs it and notes how it went. Set before it, `tests=1` says that the command runs
# tests, of which at least one must pass, and `shown=1` that its output belongs into the summary.
step() {
  local name=$1 limit=$2 began=$SECONDS log=$scratch/${1//[^A-Za-z0-9_.-]/_}.log state=passed details='' code
  shift 2
  ((limit < ends - began)) || limit=$((ends - began))
  if ((limit < 10)); then
    note "NOT RUN    $name: the time was spent"
    return 1
  fi
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  code=$?
  if [[ ${tests:-} ]]; then
    details=$(grep -aE '^=* ?[0-9]+ (passed|failed|skipped|errors?|deselected).* in [0-9.]+s' "$log" | tail -n 1)
    details+=$(grep -aE '(ERROR|RACECHECK) SUMMARY' "$log" | tail -n 1)
    details=${details//=/}
  fi
  if ((code == 124 || code == 137)); then
    state='TIMED OUT'
  elif ((code != 0)); then
    state=FAILED
  elif [[ ${tests:-} && $details != *passed* ]]; then
    state=FAILED details="no test ran:$details"
  fi
  note "$(printf '%-10s %s: %s s %s' "$state" "$name" $((SECONDS - began)) "$details")"
  [[ ${shown:-} ]] && note "$(sed 's/^/    /' "$log")"
  [[ $state != passed && ! ${shown:-} ]] && note "$(reasons "$log")"
  keep_log "$name" "$log"
  [[ $state == passed ]]
}

in_pool() { # as step, beside others
  while (($(jobs -rp | wc -l) >= POOL)); do wait -n; done
  step "$@" &
}

finish() { # what was left out and why, if anything was
  local failures
  [[ ${1:-} ]] && note "NOT RUN    $1"
  [[ -f $output/cuda.md ]] && cat "$output/cuda.md"
  grep -E '^(FAILED|TIMED OUT|NOT RUN)' "$output/summary.txt"
  failures=$(grep -cE '^(FAILED|TIMED OUT|NOT RUN)' "$output/summary.txt")
  if ((failures)); then
    note "NOT ALL WELL: $failures steps failed, timed out or were not run; $SECONDS s in all"
    exit 1
  fi
  note "all steps passed; $SECONDS s in all"
  exit 0
}

shown=1 step device 90 "$python" -c '
import sys, torch
print(sys.version, torch.__version__, torch.version.cuda, sep="; ")
if not torch.cuda.is_available():
    sys.exit("torch.cuda.is_available() is false: there is no CUDA device to run on")
print(torch.cuda.get_device_properties(0))
print(torch.ones(3, device="cuda").sum().item())' || finish 'the rest: there is no device'

step build 240 env MUDSC_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "$python" -m pip install --no-build-isolation \
  --no-deps --no-index --target "$scratch/site" . --config-settings=build-dir="$scratch/build" \
  --config-settings=cmake.define.MUDSC_CUDA_ARCHITECTURES="${MUDSC_CUDA_ARCHITECTURES:-90a-real}" ||
  finish 'the rest: there is nothing to test'
export PYTHONPATH=$scratch/site

# The Triton kernels and the reference run without these: go on whatever this says.
shown=1 step kernels 90 "$python" -c '
import sys
from mudsc_fast import cli
from mudsc_fast.kernels.cuda import _device
print(cli.info())
if _device.unavailable_reason(0):
    sys.exit(f"the CUDA kernels cannot run: {_device.unavailable_reason(0)}")'

# Warnings of other versions are no failures here.
pytest=("$python" -m pytest -p no:cacheprovider -W default --tb=short)
on_device=("${pytest[@]}" -m gpu -v --maxfail=20 -o faulthandler_timeout=50)
gpu_tests=(tests/kernels tests/test_gpu.py tests/triton_kernels/against_reference.py)

# The rest of the suite, for what changes with a device in sight. Left out is what compiles CUDA for all architectures,
# trains networks, or needs an installation or packages that need not be here; the simulator is not built.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
tests=1 MUDSC_TEST_EXAMPLES=25 in_pool suite 240 "${pytest[@]}" -q "${parallel[@]}" -m 'not gpu' tests \
  --ignore=tests/test_cuda_compiled.py --ignore=tests/test_cuda_races.py --ignore=tests/test_demo.py \
  --ignore=tests/test_examples.py --ignore=tests/test_readme.py -k 'not installed_commands and not accuracy_of'

step collect 60 "${pytest[@]}" -m gpu --collect-only -q "${gpu_tests[@]}"
while read -r function; do
  tests=1 in_pool "$function" 120 "${on_device[@]}" "$function"
done < <(sed -n 's/^\(tests[^[]*::[^[]*\).*/\1/p' "$scratch/collect.log" | sort -u)

# Small cases of every kernel. Torch's pool of memory would hide what is read beside a tensor.
declare -A cases=(
  [assignment]='tests/kernels/test_cuda_assignment.py -k (batches_on and uniform and shape1) or (one_problem and (uniform or ties or equal) and not shape1 and not shape4)'
  [correlation]='tests/kernels/test_cuda_correlation.py tests/test_gpu.py -k on_a_device and 70-16 or test_correlation'
  [zip]='tests/kernels/test_cuda_zip.py -k 16 or 254'
  [triton]='tests/triton_kernels/against_reference.py -k test_group or (test_center and strides) or (test_correlate and 70-dtype1) or not_aligned'
)
for tool in memcheck racecheck synccheck; do
  for kernels in assignment correlation zip triton; do
    read -ra files <<<"${cases[$kernels]%% -k *}"
    tests=1 in_pool "$tool of $kernels" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 --report-api-errors no \
      "${on_device[@]}" "${files[@]}" -k "${cases[$kernels]#* -k }"
  done
done
wait

# Nothing else runs beside what is measured.
ends=$END
left=$((END - SECONDS - 15))
MUDSC_BENCHMARK_SECONDS=$left PYTHONPATH=$PYTHONPATH:benchmarks \
  step benchmarks $((left + 15)) "$python" benchmarks/bench_cuda.py "$output"
finish
