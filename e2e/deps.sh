#!/usr/bin/env bash
# Installs the Debian packages that the test cluster is made of, those that are missing.
set -euo pipefail

wanted=(
  # a node
  containerd runc containernetworking-plugins
  # its network, certificates and processes
  iproute2 nftables procps util-linux openssl curl
  # images, without an engine or a registry
  buildah mmdebstrap binutils ca-certificates gcc libc6-dev
  python3
)
missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "please install: ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
