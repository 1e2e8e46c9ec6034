#!/usr/bin/env bash
# The whole story on one machine: train, gate, serve, drive; a second version promoted; a third refused, then rolled back; replay.
# Usage: examples/tour.sh [STORAGE]     (a new directory; default: a temporary one, removed at the end)
set -euo pipefail
cd "$(dirname "$0")/.."

STORAGE=${1:-$(mktemp -d)/trimtab-data}
TEMPORARY=$([ $# -ge 1 ] || dirname "$STORAGE")
export COLUMNS=${COLUMNS:-130}

say() { printf '\n== %s\n' "$*"; }
run() {
  printf '$ trimtab'
  for argument in "$@"; do case $argument in *" "*) printf " '%s'" "$argument" ;; *) printf ' %s' "$argument" ;; esac; done
  printf '\n'
  trimtab "$@" --storage "$STORAGE" 2>&1
}
json() { trimtab "$@" --storage "$STORAGE" --json 2>/dev/null; }
field() { python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
refused() { if run "$@"; then echo "this should have been refused"; exit 1; else echo "(exit code $?)"; fi; }
finish() {
  [ -z "${DRIVE:-}" ] || kill "$DRIVE" 2>/dev/null || true
  json down >/dev/null || true
  [ -z "$TEMPORARY" ] || rm -rf "$TEMPORARY"
}
trap finish EXIT

drive_in_background() {  # a client population while the release goes on; it ends by itself after ten minutes
  trimtab drive --seconds 600 --concurrency 64 --storage "$STORAGE" >"$STORAGE/drive.txt" 2>&1 &
  DRIVE=$!
}
stop_driving() {
  kill -TERM "$DRIVE"
  wait "$DRIVE" && echo "clients: no request failed" || { echo "clients saw failures"; cat "$STORAGE/drive.txt"; exit 1; }
  DRIVE=
  cat "$STORAGE/drive.txt"
}

say "Version 1: train, gate, publish, serve"
run train --set training.seed=0 --run v1
run gate --run v1
run publish --run v1
run serve --detach
run decide '[0.0, 0.1, 0.02, -0.1]' --unit-id somebody

say "100 episodes over HTTP, and what evaluation says of the same policy"
run drive --episodes 100
run evaluate --version 1 --episodes 100

say "Version 2: another seed; 5 % → 25 % → 100 % of units, decided by what the clients report"
run train --set training.seed=3 --run v2
run gate --run v2
run publish --run v2
drive_in_background
run release start --version 2 --reason "retrained with seed 3"
run release status --wait 500
stop_driving
run status

say "Version 3: version 2 with its output layer's sign flipped; the gates refuse it"
printf '$ python examples/flip_policy.py --storage STORAGE --run v2\n'
FLIPPED=$(python examples/flip_policy.py --storage "$STORAGE" --run v2)
echo "$FLIPPED"
refused gate --run "$FLIPPED"
refused publish --run "$FLIPPED"

say "Broken glass: canaried all the same, and rolled back at its first step"
run publish --run "$FLIPPED" --override-gates "drill: does the rollback work?"
refused release start --version 3
drive_in_background
run release start --version 3 --override-gates "drill: does the rollback work?"
refused release status --wait 300
stop_driving

say "Any decision can be recomputed, bit for bit"
run replay "$(json decide '[0.0, 0.1, 0.02, -0.1]' | field decision_id)"

say "The end: nothing is left running"
run down
