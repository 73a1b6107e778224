#!/usr/bin/env bash
# Builds, checks and measures the kernels on a bare machine, within ten minutes: benchmarks/on_amx.sh [more options of run.py].
# Needs cmake, g++ 12 or newer, Python with torch and pybind11; installs nothing, needs no network. No part that fails stops another.
#   OUT=benchmarks/results   where results go         PYTHON=python3    PEER=.peer   folder with kt-kernel's wheel contents, if any
#   LIMIT_S=570              seconds for everything   NAME=amx          name of the result files
#   SHAPES=v2-lite,qwen3-30b the first one goes first, the others get what time is left
#   PARTS="check none"       only these of check none adapters avx512 conditions peer-adapter others
#                            (avx512: the same machine without AMX, in files named xeon512-none)
#   MEMORY_GB=60             for weights; not read from the machine, since some virtual machines grow only when memory is used
set -uo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
out=${OUT:-benchmarks/results} python=${PYTHON:-python3} peer=${PEER:-.peer} limit_s=${LIMIT_S:-570} name=${NAME:-amx}
parts=${PARTS:-check none adapters avx512 conditions peer-adapter others}
shapes=${SHAPES:-v2-lite,qwen3-30b} memory_gb=${MEMORY_GB:-60}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
mkdir -p "$out"
failed=0

left_s() { echo $((limit_s - (SECONDS - start) > 5 ? limit_s - (SECONDS - start) : 5)); }

# step NAME SECONDS COMMAND…: its output goes to the log and the screen; it ends at its limit or the whole script's.
step() {
  local step_name=$1 step_s=$2 begun=$SECONDS status=0
  shift 2
  [[ " build $parts " == *" $step_name "* ]] || return 0
  step_s=$((step_s < $(left_s) ? step_s : $(left_s)))
  echo "== $step_name (at $((SECONDS - start)) s, at most $step_s s)"
  timeout --kill-after=5 "$step_s" "$@" 2>&1 | tee "$out/$name-$step_name.log" | tail -n 60
  status=${PIPESTATUS[0]}
  echo "== $step_name: $([ "$status" = 0 ] && echo done || echo "FAILED with $status") after $((SECONDS - begun)) s"
  [ "$status" = 0 ] || failed=1
  return "$status"
}

build() {
  cmake -S kernels -B "$built/cmake" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$built/cmake" -j "$(nproc)" &&
    mkdir -p "$built/site/kt_kernels" &&
    cp kernels/kt_kernels/*.py "$built/cmake"/_core*.so "$built/site/kt_kernels/" &&
    PYTHONPATH="$built/site" "$python" -c 'import kt_kernels; print("runs here:", kt_kernels.isas())'
}
export -f build
export built python

step build 240 bash -c build || exit 1
export PYTHONPATH="$built/site${PYTHONPATH:+:$PYTHONPATH}"

step check 110 "$python" benchmarks/check_methods.py

peer_option=()
[ -d "$peer/kt_kernel" ] && peer_option=(--kt-kernel "$peer")
# One hardware thread a core, as the launcher plans it: for the peaks and for every contender alike.
cores=$(lscpu -p=cpu,core | awk -F, '!/#/ && !seen[$2]++ { print $1 }' | paste -sd,)

# measure NAME SECONDS OPTIONS…: what the time does not reach is named in the notes of the run.
measure() {
  local part=$1 part_s=$2 file=$name-$1
  shift 2
  [ "$part" != avx512 ] || file=xeon512-none
  part_s=$((part_s < $(left_s) ? part_s : $(left_s)))
  [[ " $parts " != *" $part "* ]] || [ "$part_s" -ge 25 ] || { echo "== $part: no time left"; return; }
  step "$part" "$part_s" taskset -c "$cores" "$python" benchmarks/run.py --json "$out/$file.json" \
    --limit-s "$((part_s * 8 / 10))" --cell-s 0.7 --distinct 16 --memory-gb "$memory_gb" --torch bf16 "$@"
}

# What the goals ask for first.
first=${shapes%%,*} others=${shapes#*,}
measure none 130 --shapes "$first" --tokens 1,4,16,64,256,1024 --adapters none "${peer_option[@]}" "$@"
measure adapters 90 --shapes "$first" --tokens 1,64,1024 --adapters 1x16,1x64,8x16,8x16idle --torch none "$@"
measure avx512 60 --shapes "$first" --tokens 1,64,256,1024 --adapters none --torch none --isa avx512 "$@"
step conditions 70 "$python" benchmarks/run.py --json "$out/$name-conditions.json" --conditions-only --cell-s 0.4 \
  --distinct 16 --memory-gb "$memory_gb" --shapes "$first" --overhead --scaling --load --phases --soak 3000
measure peer-adapter 80 --shapes "$first" --tokens 1,64,1024 --adapters 1x16 --torch none "${peer_option[@]}" "$@"
measure others "$(left_s)" --shapes "$others" --tokens 1,64,1024 --adapters none "${peer_option[@]}" "$@"

echo "== all: $((SECONDS - start)) s, results in $out"
exit "$failed"
