#!/usr/bin/env bash
# Builds the package for a Hopper GPU, measures it there, tests it, and looks for bad accesses and races, in 500 seconds:
#
#   benchmarks/run_on_gpu.sh [--smoke] OUTPUT_FOLDER
#
# The most valuable results come first: that the kernels run and agree with the CPU, about 100 seconds of benchmarks
# alone on the device, the tests marked gpu, and compute-sanitizer. --smoke takes 4 minutes: eight benchmarks, and a
# small case of each kernel, which memcheck sees too.
#
# It needs no network: Python with torch, triton, pytest, pybind11, scikit-build-core, cmake and ninja, CUDA's compiler
# and compute-sanitizer must be installed. PYTHON names another python3, MUDSC_CUDA_ARCHITECTURES other devices than 9.0.
#
# OUTPUT_FOLDER receives summary.txt (a line for each step, and what went wrong), log.txt (all output), cuda.json and
# cuda.md (the measurements), and site.tar.gz (the built package). A second call with the same folder, or with
# MUDSC_SITE=path of such an archive, skips the build if the sources of the kernels have not changed.
#
# Every test function has its own process, so that one that hangs or loses the device affects no other. A step in which
# no test ran has failed. The exit status is 0 if all steps passed.
set -uo pipefail

smoke=''
if [[ ${1:-} == --smoke ]]; then
  smoke=1
  shift
fi
all=500 benchmark=100
[[ $smoke ]] && all=240 benchmark=45
readonly ALL=${MUDSC_GPU_SECONDS:-$all} # seconds from the start to the end
readonly BENCHMARK=$((benchmark * ALL / all))
readonly END=$((ALL - 6))          # of the last step; the rest is for one that has to be killed
readonly LEAST=$((ALL / 50 + 1))   # seconds: with less no step is started (and timeout takes 0 for no limit)
readonly POOL=10                   # steps at a time while nothing is measured
readonly MAX_SITE=$((16 * 1024 * 1024))

output=$(mkdir -p "${1:?usage: $0 [--smoke] OUTPUT_FOLDER}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
rm -f "$output"/{summary.txt,log.txt,cuda.json,cuda.md}
python=${PYTHON:-python3}
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer; do
  [[ -d $folder ]] && PATH=$PATH:$folder
done
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR=$scratch/triton
export MUDSC_CUDA_ARCHITECTURES=${MUDSC_CUDA_ARCHITECTURES:-90a-real}

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

keep_log() { # name, file: adds it to log.txt; of a very long log its two ends
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

# step NAME SECONDS COMMAND...: runs it and notes how it went. Variables set before it: `tests=1` says that the command
# runs tests, of which at least one must pass; `shown=1` that its output belongs in the summary; `reported=1` that a
# failure is reported but is not a failure of the run.
step() {
  local name=$1 limit=$2 began=$SECONDS log=$scratch/${1//[^A-Za-z0-9_.-]/_}.log state=passed details='' code
  shift 2
  ((limit < END - began)) || limit=$((END - began))
  if ((limit < LEAST)); then
    note "NOT RUN    $name: no time was left"
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
  [[ $state != passed && ${reported:-} ]] && details="$state; $details" state=REPORTED
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
  grep -E '^(FAILED|TIMED OUT|NOT RUN|REPORTED)' "$output/summary.txt"
  failures=$(grep -cE '^(FAILED|TIMED OUT|NOT RUN)' "$output/summary.txt")
  if ((failures)); then
    note "NOT ALL WELL: $failures steps failed, timed out or were not run; $SECONDS s in all"
    exit 1
  fi
  note "all steps passed; $SECONDS s in all"
  exit 0
}

shown=1 step device 60 "$python" -c '
import sys, torch
print(sys.version, torch.__version__, torch.version.cuda, sep="; ")
if not torch.cuda.is_available():
    sys.exit("torch.cuda.is_available() is false: there is no CUDA device to run on")
print(torch.cuda.get_device_properties(0))
print(torch.ones(3, device="cuda").sum().item())' || finish 'the rest: there is no device'

# Key that decides whether a build can be reused; Python sources are always copied.
build_key() {
  { find csrc cmake CMakeLists.txt -type f | LC_ALL=C sort | xargs sha256sum &&
    "$python" -c 'import sys; print(sys.version_info[:2])' && echo "$MUDSC_CUDA_ARCHITECTURES"; } | sha256sum
}

unpack_site() {
  local archive=${MUDSC_SITE:-$output/site.tar.gz}
  [[ -f $archive ]] && mkdir -p "$scratch/site" && tar -xzf "$archive" -C "$scratch/site" &&
    [[ $(cat "$scratch/site/build_key" 2>/dev/null) == "$(build_key)" ]] &&
    cp -r python/mudsc_fast/. "$scratch/site/mudsc_fast"
}

save_site() {
  build_key >"$scratch/site/build_key" && tar -czf "$scratch/site.tar.gz" -C "$scratch/site" . &&
    (($(stat -c %s "$scratch/site.tar.gz") <= MAX_SITE)) && mv "$scratch/site.tar.gz" "$output/site.tar.gz"
}

if unpack_site; then
  note 'passed     build: the one that was saved'
else
  rm -rf "$scratch/site"
  step build 200 env MUDSC_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "$python" -m pip install \
    --no-build-isolation --no-deps --no-index --target "$scratch/site" . --config-settings=build-dir="$scratch/build" \
    --config-settings=cmake.define.MUDSC_CUDA_ARCHITECTURES="$MUDSC_CUDA_ARCHITECTURES" ||
    finish 'the rest: there is nothing to test'
  save_site || note "the build was not saved: it is larger than $MAX_SITE bytes"
fi
export PYTHONPATH=$scratch/site

# The Triton kernels and the reference run without these: continue whatever the result is.
shown=1 step kernels 60 "$python" -c '
import sys, warnings
import torch, mudsc_fast
from mudsc_fast import cli
from mudsc_fast.kernels.cuda import _device
print(cli.info())
if _device.unavailable_reason(0):
    sys.exit(f"the CUDA kernels cannot run: {_device.unavailable_reason(0)}")
warnings.simplefilter("error")  # as of a self-test that failed
numbers = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0))
similarity = torch.corrcoef(torch.cat([numbers[0], numbers[1]], 1).T)
found = []
for device in ("cpu", "cuda"):
    sums = mudsc_fast.CorrelationAccumulator(2, 40, blocks="full", device=torch.device(device))
    sums.update(*numbers.to(device))
    there = similarity.to(device)
    clusters = mudsc_fast.zip_units(there, 2).cluster_of_unit
    columns = mudsc_fast.linear_assignment(there[:40, 40:].contiguous()).columns
    found.append([one.cpu() for one in (sums.finalize(), clusters, columns)])
(expected, *exact), (correlation, *others) = found
if (correlation - expected).abs().max() > 3e-6 or not all(map(torch.equal, exact, others)):
    sys.exit(f"other results than on the CPU: {found}")
print("correlation, zip and assignment give the results of the CPU")'

# Nothing else runs beside what is measured.
MUDSC_BENCHMARK_SECONDS=$BENCHMARK PYTHONPATH=$PYTHONPATH:benchmarks \
  step benchmarks $((BENCHMARK + 20)) "$python" benchmarks/bench_cuda.py ${smoke:+--smoke} "$output"

# Warnings of other versions are no failures here.
pytest=("$python" -m pytest -p no:cacheprovider -W default --tb=short)
on_device=("${pytest[@]}" -m gpu -v --maxfail=20 -o faulthandler_timeout=50)
gpu_tests=(tests/kernels tests/test_gpu.py tests/triton_kernels/against_reference.py)

# Small cases of every kernel. Torch's pool of memory would hide what is read beside a tensor.
declare -A cases=(
  [assignment]='tests/kernels/test_cuda_assignment.py -k (batches_on and uniform and shape1) or (one_problem and (uniform or ties or equal) and not shape1 and not shape4)'
  [correlation]='tests/kernels/test_cuda_correlation.py tests/test_gpu.py -k on_a_device and 70-16 or test_correlation'
  [zip]='tests/kernels/test_cuda_zip.py -k 16 or 254'
  [triton]='tests/triton_kernels/against_reference.py -k test_group or (test_center and strides) or (test_correlate and 70-dtype1) or not_aligned'
)
small_case() { # name, kernels, command before python...: runs it
  local name=$1 files
  read -ra files <<<"${cases[$2]%% -k *}"
  local kernels=$2
  shift 2
  tests=1 in_pool "$name" 150 "$@" "${on_device[@]}" "${files[@]}" -k "${cases[$kernels]#* -k }"
}
sanitize() { # tool, kernels, environment...
  local tool=$1 kernels=$2
  shift 2
  small_case "$tool of $kernels${1:+ (${1#*=})}" "$kernels" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$@" \
    compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 --report-api-errors no
}

if [[ $smoke ]]; then
  for kernels in assignment correlation zip triton; do small_case "tests of $kernels" "$kernels" env; done
  wait
  for kernels in assignment correlation zip triton; do sanitize memcheck "$kernels"; done
  wait
  finish
fi

step collect 60 "${pytest[@]}" -m gpu --collect-only -q "${gpu_tests[@]}"
while read -r function; do
  tests=1 in_pool "$function" 120 "${on_device[@]}" "$function"
done < <(sed -n 's/^\(tests[^[]*::[^[]*\).*/\1/p' "$scratch/collect.log" | sort -u)
wait

for kernels in assignment zip triton; do
  for tool in memcheck racecheck synccheck; do sanitize "$tool" "$kernels"; done
done
for instructions in mma.sync wgmma; do
  for tool in memcheck synccheck; do sanitize "$tool" correlation MUDSC_TENSOR_CORES="$instructions"; done
done
sanitize racecheck correlation MUDSC_TENSOR_CORES=mma.sync
# racecheck does not follow what wgmma reads past the path of loads, so that its findings need a look, not a fix.
reported=1 sanitize racecheck correlation MUDSC_TENSOR_CORES=wgmma
wait
finish
