#!/usr/bin/env bash
# The end-to-end tests: everything they need is built, a cluster is started, the chart is installed, the tests run, and
# nothing is left. Arguments go to the test program: words that choose tests, --list, --figures. KEEP=1 leaves the cluster up,
# which makes the next run short; after a failure target/e2e/logs has what the cluster knew. KUBERNETES chooses the version,
# PROFILE=release packs optimised binaries.
set -euo pipefail
. "$(dirname "$0")/cluster/env.sh"
cd "$repository"

finish() {
  local status=$?
  trap - EXIT INT TERM
  [ $status = 0 ] || e2e/cluster.sh logs || true
  if [ -n "${KEEP:-}" ]; then
    echo "the cluster stays: e2e/cluster/kubectl.sh; make cluster-down removes it" >&2
  else
    e2e/cluster.sh down || status=1
  fi
  exit $status
}

# --- What needs a network comes first: inside the cluster's namespaces there is none ----------------------------------
e2e/deps.sh
e2e/cluster/build.sh >/dev/null
e2e/tools.sh
e2e/chart.sh
cargo build --workspace --bins --profile "${PROFILE:-dev}"
if [ $# = 0 ]; then
  # What needs no node: the operator on an API server alone, and the conformance tests of the driver.
  FOREBAY_KUBERNETES=$e2e/kubernetes/$kubernetes cargo test --workspace --profile "${PROFILE:-dev}" --test api_server
  csi-driver/sanity.sh
fi

trap finish EXIT
trap 'exit 130' INT TERM
e2e/cluster.sh up
e2e/images.sh load forebay forebay-operator forebay-csi trainer trainer-torch

# --- The chart, and the tests, from where the API server, pods and the store are ---------------------------------------
binaries=target/${PROFILE:-dev}
[ "$binaries" = target/dev ] && binaries=target/debug
run() {
  e2e/cluster/inside.sh env FOREBAY_E2E_INSIDE=1 FOREBAY_E2E_CLUSTER="$here" FOREBAY_E2E_ROOT="$repository" \
    FOREBAY_E2E_STORE=http://s3.example.com:9000 FOREBAY_E2E_STORE_LOG="$state/store/access.log" "$@"
}
run e2e/install.sh
run "$binaries/forebay-e2e" "$@"
