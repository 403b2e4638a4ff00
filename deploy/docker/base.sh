#!/bin/sh
# Makes a base image from Debian's packages, for a machine that reaches no registry of images:
#   sh deploy/docker/base.sh localhost/python-debian:3.11
# Runs as root, with buildah and mmdebstrap (apt-get install --no-install-recommends buildah mmdebstrap). About 110 MB: no
# manual pages, translations or pip. Everybody else takes the official image, which is the default of the Dockerfiles.
set -eu
name=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"

# shellcheck disable=SC2016 # mmdebstrap's hooks expand $1
mmdebstrap --quiet --variant=apt --mode=root --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
  --include=usr-is-merged,python3-venv,ca-certificates \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook='ln -s python3 "$1/usr/bin/python"' \
  --customize-hook='rm -f "$1/etc/hostname" "$1/etc/resolv.conf"' bookworm "$scratch/base.tar"

container=$(buildah from scratch)
buildah add --quiet "$container" "$scratch/base.tar" /
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$name"
