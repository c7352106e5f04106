#!/usr/bin/env bash
# Writes what is generated from the code: crds/, docs/api.md, docs/metrics*.md. Tests fail when they differ.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo run --quiet --package forebay-api --example crds -- --write
UPDATE_DOCS=1 cargo test --quiet --package forebay-cache-worker metrics
UPDATE_DOCS=1 cargo test --quiet --package forebay-fuse metrics
UPDATE_DOCS=1 cargo test --quiet --package forebay-operator metrics
