#!/bin/sh
# Builds versitygw, an S3 gateway over a POSIX folder written by others, into target/tools and prints its path. The
# conformance suite of the under store runs against it:
#   FOREBAY_VERSITYGW=$(scripts/versitygw.sh) cargo test -p forebay-under-store
# A binary of the pinned version that is already there is used as it is.
set -eu

version=v1.8.0
cd "$(dirname "$0")/.."
tools=$(pwd)/target/tools
binary=$tools/versitygw-$version

if [ ! -x "$binary" ]; then
    mkdir -p "$tools"
    build=$(mktemp -d "$tools/build.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    GOBIN=$build CGO_ENABLED=0 go install "github.com/versity/versitygw/cmd/versitygw@$version" >&2
    mv "$build/versitygw" "$binary"
fi
echo "$binary"
