#!/usr/bin/env bash
# sanitize.sh PROGRAM: runs sidp_kernels_check alone, then under compute-sanitizer's memcheck and racecheck. Without
# compute-sanitizer it stops there: a failure with SIDP_TEST_GPU=1.
set -euo pipefail
program=$1
timeout 120 "$program"
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin: kernels not checked by it" >&2
  [ "${SIDP_TEST_GPU:-0}" != 1 ]
  exit
fi
for tool in memcheck racecheck; do
  echo "== compute-sanitizer --tool $tool"
  timeout 240 "$sanitizer" --tool "$tool" --error-exitcode 1 "$program" serial
done
