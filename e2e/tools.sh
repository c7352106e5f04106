#!/usr/bin/env bash
# Builds programs that the tests use, from Go modules, into target/e2e/bin: tools.sh NAME... (default: all but kwok)
#   csi-sanity   conformance of the CSI driver
#   helm         installs the chart
#   toxiproxy    latency, slow closes and cuts between any two ends of TCP
#   versitygw    S3 over a folder, written by others
#   kwok         thousands of simulated nodes and pods, for tests of scale
# One of the right version that is already there is used as it is.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
bin=$repository/target/e2e/bin
mkdir -p "$bin" "$repository/target/e2e/build"
command -v go >/dev/null || { echo "please install Go" >&2; exit 1; }
export GOWORK=off

install() { # NAME PROGRAM VERSION PACKAGE [LDFLAGS]: PROGRAM is what Go calls it
  local name=$1 program=$2 version=$3 package=$4 ldflags=${5:-} build
  [ -x "$bin/$name" ] && [ "$(cat "$bin/$name.stamp" 2>/dev/null)" = "$version" ] && return
  exec 9>"$repository/target/e2e/build/$name.lock"; flock 9 # two runs at once build once
  [ -x "$bin/$name" ] && [ "$(cat "$bin/$name.stamp" 2>/dev/null)" = "$version" ] && return
  echo "building $name $version" >&2
  build=$(mktemp -d "$repository/target/e2e/build/$name.XXXXXX")
  GOBIN=$build CGO_ENABLED=0 go install -trimpath -ldflags "-s -w $ldflags" "$package@$version" >&2
  mv "$build/$program" "$bin/$name"
  rmdir "$build"
  echo "$version" > "$bin/$name.stamp"
}

[ $# -gt 0 ] || set -- csi-sanity helm toxiproxy versitygw
for tool in "$@"; do
  case $tool in
    csi-sanity) install csi-sanity csi-sanity v5.6.0 github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity ;;
    helm) install helm helm v4.3.1 helm.sh/helm/v4/cmd/helm "-X helm.sh/helm/v4/internal/version.version=v4.3.1" ;;
    toxiproxy) install toxiproxy server v2.12.0 github.com/Shopify/toxiproxy/v2/cmd/server ;;
    versitygw)
      # the conformance tests of the under store build it, too
      ln -sf "$("$repository/scripts/versitygw.sh")" "$bin/versitygw" ;;
    kwok) install kwok kwok v0.8.0 sigs.k8s.io/kwok/cmd/kwok ;;
    *) echo "no tool $tool" >&2; exit 2 ;;
  esac
done
