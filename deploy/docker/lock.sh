#!/bin/sh
# Locks the packages of each image, at the versions of requirements.lock, for Linux on x86-64 and on ARM. Run it after
# `make lock`.
set -eu
cd "$(dirname "$0")"
project=../../pyproject.toml
lock() {
  name=$1; shift
  ../../.venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
    --constraint ../../requirements.lock --output-file "$name.lock" "$@"
}
lock serving-cpu --extra serving --override serving-cpu.override $project build.in onnxruntime-cpu.in
lock serving-remote --extra serving --extra remote --override serving-cpu.override $project build.in onnxruntime-cpu.in
lock serving-gpu --extra serving-gpu $project build.in
set -- --extra trainer --extra serving --extra kubernetes $project build.in # trains, and runs the training service
lock trainer-cpu --override trainer-cpu.override "$@" onnxruntime-cpu.in torch-cpu.in
lock trainer-gpu "$@"
lock sbom sbom.in
