#!/usr/bin/env bash
# Builds the package with its GPU backend in place, runs the kernels under compute-sanitizer, then the conformance suite
# and the GPU tests on the GPUs of this machine; with one GPU the ranks share it. Needs nvcc, torch for CUDA, nvshmem4py,
# cmake, ninja, pybind11, pytest and pytest-timeout. Arguments go to pytest: with pytest-xdist -n 4 on one GPU and 16 cores,
# -n 10 on two GPUs and 32 cores; more starve each other, as each process has CUDA load all kernels.
# SIDP_TEST_BUILD=0: do not build.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if [ "${SIDP_TEST_BUILD:-1}" = 1 ]; then
  cmake -S . -B build/gpu -G Ninja -DSIDP_WITH_CUDA=ON -DSIDP_BUILD_KERNELS_CHECK=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build build/gpu
  cmake --install build/gpu --component python --prefix sidp_runtime
fi
# SIDP_TEST_GPU: what is missing fails, nothing is skipped
export SIDP_TEST_GPU=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
tests/gpu/sanitize.sh build/gpu/sidp_kernels_check
pytest=("$python" -m pytest -p no:cacheprovider -p no:benchmark)
"${pytest[@]}" tests/conformance tests/gpu --ignore tests/gpu/test_leaks.py -k "nvshmem or gpu" "$@"
"${pytest[@]}" tests/gpu/test_leaks.py  # alone on the device
