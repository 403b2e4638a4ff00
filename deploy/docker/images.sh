#!/bin/sh
# Builds images; all but serving-remote if none is named:
#   sh deploy/docker/images.sh [serving] [serving-remote] [serving-gpu] [trainer] [trainer-gpu]
# Environment variables:
#   ENGINE         docker, podman or buildah; otherwise the first of them that is installed
#   REGISTRY, TAG  of the names: REGISTRY/serving:TAG; otherwise localhost/convoy and the version in pyproject.toml
#   BASE           the base image, in production by digest; otherwise the Dockerfiles' own
#   TORCH_INDEX    the address of PyTorch's wheels for CPUs, which `trainer` needs
#   BUILD_OPTIONS  more options for the engine, such as --platform=linux/arm64
# The images hold no times but that of the last commit (SOURCE_DATE_EPOCH): two builds of a commit are equal.
set -eu
cd "$(dirname "$0")/../.."

engine=${ENGINE:-}
for known in docker podman buildah; do
  if [ -z "$engine" ] && command -v "$known" >/dev/null; then engine=$known; fi
done
[ -n "$engine" ] || { echo "error: docker, podman or buildah must be installed" >&2; exit 2; }

registry=${REGISTRY:-localhost/convoy}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}

build() { # NAME DOCKERFILE VARIANT
  tag="$registry/$1:${TAG:-$version}"
  set -- --file "deploy/docker/$2.Dockerfile" --build-arg "VARIANT=$3" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" --tag "$tag"
  [ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
  [ -z "${TORCH_INDEX:-}" ] || set -- "$@" --build-arg "TORCH_INDEX=$TORCH_INDEX"
  case $engine in
    docker) set -- "$@" --build-arg "SOURCE_DATE_EPOCH=$epoch" ;;
    *) set -- "$@" --timestamp "$epoch" ;;
  esac
  echo "building $tag"
  # shellcheck disable=SC2086 # several options
  "$engine" build "$@" ${BUILD_OPTIONS:-} .
}

[ $# -gt 0 ] || set -- serving serving-gpu trainer trainer-gpu
for image in "$@"; do
  case $image in
    serving) build serving serving cpu ;;
    serving-remote) build serving-remote serving remote ;;
    serving-gpu) build serving-gpu serving gpu ;;
    trainer) build trainer trainer cpu ;;
    trainer-gpu) build trainer-gpu trainer gpu ;;
    *) echo "error: no image '$image'; there are serving, serving-remote, serving-gpu, trainer and trainer-gpu" >&2; exit 2 ;;
  esac
done
