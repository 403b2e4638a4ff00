#!/bin/sh
# Locks the packages of each image, at the versions of requirements.lock. Run it after `make lock`.
set -eu
cd "$(dirname "$0")/../.."
lock() {
  name=$1; shift
  .venv/bin/uv pip compile --quiet --generate-hashes --no-header --python-version 3.11 --python-platform linux \
    --constraint requirements.lock --output-file "deploy/docker/$name.lock" "$@" deploy/docker/build.in
}
lock serving-cpu --extra serving --override deploy/docker/serving-cpu.override pyproject.toml deploy/docker/serving-cpu.in
lock serving-gpu --extra serving-gpu pyproject.toml
lock trainer --extra trainer --extra serving --extra kubernetes pyproject.toml # trains, and runs the training service
