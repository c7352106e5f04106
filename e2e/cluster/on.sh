#!/usr/bin/env bash
# on.sh N COMMAND...: runs a command inside node N, as root (ctr -n k8s.io, mount, nft, pkill -x kubelet, ...)
set -euo pipefail
. "$(dirname "$0")/env.sh"
pid=$("$here/node.sh" pid "$1") || die "node $1 is off"
exec nsenter -t "$pid" --mount --uts --net --pid -- "${@:2}"
