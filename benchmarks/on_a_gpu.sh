#!/bin/sh
# All that only a GPU can show, on a machine without a network: sh benchmarks/on_a_gpu.sh DATA OUT [PART ...]
#
# DATA is a folder of data sets, OUT gets the logs and tables. Parts, in this order by default: tests, steps, clock,
# cold, seeds, ranks, decoders, serving. Each has a time limit, and one that fails ends no other. Needs torch, pytest and
# the trainer's requirements; Convoy itself need not be installed. `decoders` needs torchvision too, `serving` gRPC,
# pygrpc-native, and onnxruntime-gpu in place of onnxruntime (without it, ONNX is left out).
set -u
parts="tests steps clock cold seeds ranks decoders serving"
fail() {
  echo "error: $1" >&2
  exit 2
}
[ $# -ge 2 ] || fail "usage: sh benchmarks/on_a_gpu.sh DATA OUT [PART ...]"
[ -d "$1" ] || fail "$1: no such folder of data sets"
data=$(cd "$1" && pwd)
out=$(mkdir -p "$2" && cd "$2" && pwd) || exit 2
shift 2
for part in "$@"; do
  case " $parts " in *" $part "*) ;; *) fail "no part is called $part: there are $parts" ;; esac
done
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # other packages' plugins have options and warnings of their own
limit="" parallel=""
python3 -c "import pytest_timeout" 2> /dev/null && limit="-p pytest_timeout --timeout=150"
python3 -c "import xdist" 2> /dev/null && parallel="-p xdist -n 4 --dist loadfile"
# shellcheck disable=SC2086 # several words
[ $# -gt 0 ] || set -- $parts
measure() {
  case $1 in
    tests)
      # shellcheck disable=SC2086 # several words
      timeout -s INT -k 20 420 python3 -m pytest -m gpu -v --durations=20 --continue-on-collection-errors $limit $parallel \
        --log-level=INFO -p no:cacheprovider --data-dir="$data"
      ;;
    decoders)
      timeout -k 10 60 python3 benchmarks/jpegs.py "$out/jpegs" --files 500 &&
        timeout -k 10 120 python3 benchmarks/decoders.py "$out/jpegs"
      set -- $?
      rm -rf "$out/jpegs"
      return "$1"
      ;;
    serving) timeout -k 10 150 python3 benchmarks/serving_gpu.py --out "$out" ;;
    *) timeout -k 10 420 python3 benchmarks/gpu.py --part "$1" --minutes 5 --data-dir "$data" --out "$out" ;;
  esac
}
failed=0
for part in "$@"; do
  began=$(date +%s)
  measure "$part" > "$out/$part.log" 2>&1
  code=$?
  [ $code = 0 ] || failed=1
  tail -n 40 "$out/$part.log"
  echo "== $part: exit code $code after $(($(date +%s) - began)) s"
done
exit $failed
