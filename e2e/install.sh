#!/usr/bin/env bash
# Installs the chart, with the images of this working tree, into the test cluster (or upgrades it), and waits until it is ready.
#   install.sh [--set NAME=VALUE]...
set -euo pipefail
cd "$(dirname "$0")/.."
inside() { if [ -n "${FOREBAY_E2E_CLUSTER:-}" ] && [ -z "${FOREBAY_E2E_INSIDE:-}" ]; then e2e/cluster/inside.sh "$@"; else "$@"; fi; }

inside helm upgrade --install forebay charts/forebay --namespace forebay-system --create-namespace --wait --timeout 3m \
  --values e2e/values.yaml "$@"
