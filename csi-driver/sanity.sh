#!/bin/sh
# Runs csi-sanity 5.6, the conformance tests of CSI, against the driver: its real process with --controller, real mounts,
# real FUSE daemons. As root. Builds csi-sanity with Go when it is not there
# yet; CSI_SANITY names another one.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${CSI_SANITY:-}" ]; then
  e2e/tools.sh csi-sanity
  CSI_SANITY=$PWD/target/e2e/bin/csi-sanity
fi
export CSI_SANITY
# The whole workspace: its features are what other tests were built with.
exec cargo test --locked --workspace --test node -- --nocapture sanity::
