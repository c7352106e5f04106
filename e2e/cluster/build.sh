#!/usr/bin/env bash
# Builds what the cluster is made of from Go modules, and prints the folder of the Kubernetes binaries. A build of the same
# versions and sources that is already there is used as it is. KUBERNETES chooses the version: v1.37.2 or v1.34.4.
#   target/e2e/kubernetes/VERSION/   etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy, kubelet,
#                                    kubectl: one binary, called by its name
#   target/e2e/bin/coredns
# The first build takes 10 minutes on 2 cores; Go's build cache makes a later one short.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
e2e=$(cd "$here/../.." && pwd)/target/e2e
kubernetes=${KUBERNETES:-v1.37.2}
coredns=v1.15.0
case $kubernetes in
  v1.3[0-4].*) etcd=${ETCD:-v3.6.5} ;;
  *) etcd=${ETCD:-v3.7.3} ;;
esac
command -v go >/dev/null || { echo "please install Go: the test cluster is built from Go modules" >&2; exit 1; }
export GOWORK=off
mkdir -p "$e2e/bin" "$e2e/build"

# build NAME OUTPUT VERSIONS FUNCTION: runs FUNCTION in an empty folder, with the path to write as argument, unless OUTPUT
# is there and was made of these versions and of the sources in the folder of the function's name.
build() {
  local name=$1 output=$2 want source=$e2e/build/$1
  want="$3 $(cat "$here/$4"/* | sha256sum)"
  done_already() { [ -e "$output" ] && [ "$(cat "$output.stamp" 2>/dev/null)" = "$want" ]; }
  done_already && return
  exec 9>"$e2e/build/$name.lock"; flock 9 # two runs at once build once
  done_already && return
  echo "building $3" >&2
  rm -rf "$source"; mkdir -p "$source" "$(dirname "$output")"
  (
    cd "$source"
    "$4" "$output.new"
  ) >&2
  mv "$output.new" "$output"
  echo "$want" > "$output.stamp"
}

kubernetes() {
  local version=k8s.io/component-base/version minor=${kubernetes#v1.}
  cp "$here/kubernetes/main.go" .
  python3 "$here/kubernetes/gomod.py" "$kubernetes" "$etcd" > go.mod
  go mod tidy
  CGO_ENABLED=0 go build -trimpath -o "$1" -ldflags \
    "-s -w -X $version.gitVersion=$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*}" .
  for c in etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
    ln -sf kube "$out/$c"
  done
}

coredns() {
  cp "$here/coredns/main.go" .
  go mod init forebay.io/e2e/coredns
  go get "github.com/coredns/coredns@$coredns"
  go mod tidy
  CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1" .
}

out=$e2e/kubernetes/$kubernetes
build "kubernetes-$kubernetes" "$out/kube" "Kubernetes $kubernetes with etcd $etcd" kubernetes
build coredns "$e2e/bin/coredns" "CoreDNS $coredns" coredns
echo "$out"
