#!/usr/bin/env bash
# Everything a GPU has to tell, in one command of at most nine minutes:
#
#   tests/gpu_check.sh OUT DATA [--tiny]
#
# OUT gets report.txt (most important first, written anew after every section, so a run that is
# cut short keeps what it has) and the raw numbers: eight files, each below 16 MiB.
# DATA is a folder that `tests/gpu_full_run.py prepare` has written (shards and tokenizer.model).
#
# Needs beside it: this repository, and a python3 with torch, triton, numpy, sentencepiece and
# brotli. Nothing is installed or fetched. Another python: PYTHON=path. Other settings of the full
# run: FULL_RUN_SETTINGS="NAME=VALUE ...". --tiny tries the whole agenda on a CPU in a minute.
set -uo pipefail

usage() { sed -n '2,13p' "$0" | cut -c3-; exit 2; }
[ $# -ge 2 ] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) data=$2 tiny=${3:-}
[ -z "$tiny" ] || [ "$tiny" = --tiny ] || { echo "error: $tiny: the only option is --tiny" >&2; exit 2; }
[ -f "$data/tokenizer.model" ] || {
  echo "error: DATA=$data: no tokenizer.model in it; make the folder with" \
       "python tests/gpu_full_run.py prepare" >&2; exit 2; }
data=$(cd "$data" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit_seconds=530
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$out/sections.txt"

report() { "$python" "$root/tests/gpu_report.py" "$out" > "$out/report.txt"; }

# section NAME SECONDS LOG COMMAND...: run a command for at most so long, note how it ended
section() {
  local name=$1 most=$2 log=$3 left=$((limit_seconds - SECONDS)) began=$SECONDS rc
  shift 3
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 10 ]; then
    echo "$name skipped 0" >> "$out/sections.txt"
  else
    echo "== $name (at most $most s)" >&2
    timeout -k 5 "$most" "$@" >> "$out/$log" 2>> "$out/console.txt"
    rc=$?
    echo "$name $rc $((SECONDS - began))" >> "$out/sections.txt"
  fi
  report
}

describe() {
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  "$python" -c 'import platform, sys, torch; print(sys.version, torch.__version__, platform.node())'
  git -C "$root" log -1 --format=%H 2>/dev/null || echo "no git history beside it"
  sha256sum "$root/train_gpt.py"
}

full_run() {
  cd "$work" || return 1
  # shellcheck disable=SC2086  # the settings are words
  "$python" "$root/tests/gpu_full_run.py" run "$data" ${FULL_RUN_SETTINGS:-}
  local rc=$?
  cp runs/*/events.jsonl "$out/events.jsonl"
  return $rc
}
export -f full_run describe
export python root data work out

rm -f "$out"/{bench,kernels,events}.jsonl "$out"/{full_run,device,console}.txt
section device 30 device.txt bash -c describe
section full_run 190 full_run.txt bash -c full_run
bench="$root/tests/bench_step.py"
if [ -n "$tiny" ]; then
  section step 60 console.txt "$python" "$bench" --tiny --rows "$out/bench.jsonl" \
    --sections step,frontier
  section kernels 60 kernels.jsonl env TRITON_INTERPRET=1 "$python" -m candidates.check odd
  section parts 60 console.txt "$python" "$bench" --tiny --rows "$out/bench.jsonl" \
    --sections evaluation,memory,parts,artifact,overlay
else
  section step 170 console.txt "$python" "$bench" --rows "$out/bench.jsonl" --sections step
  section frontier 150 console.txt "$python" "$bench" --rows "$out/bench.jsonl" --sections frontier
  section kernels 60 kernels.jsonl "$python" -m candidates.check full
  section swap 200 console.txt "$python" "$bench" --rows "$out/bench.jsonl" --sections candidates
  section parts 120 console.txt "$python" "$bench" --rows "$out/bench.jsonl" \
    --sections evaluation,memory,parts,artifact
  section overlay 100 console.txt "$python" "$bench" --rows "$out/bench.jsonl" --sections overlay
fi
cat "$out/report.txt"
! grep -qE ' [1-9][0-9]* [0-9]+$' "$out/sections.txt"
