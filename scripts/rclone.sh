#!/bin/sh
# Builds rclone into target/tools and prints its path: the client that cold reads are compared with, and the WebDAV
# server of the tests of http:// sources. Only what these need of it: S3, local files, `copyto`, `serve webdav`. A
# binary of the pinned version that is already there is used as it is.
set -eu

version=v1.76.0
cd "$(dirname "$0")/.."
tools=$(pwd)/target/tools
binary=$tools/rclone-$version-webdav

if [ ! -x "$binary" ]; then
    mkdir -p "$tools"
    build=$(mktemp -d "$tools/build.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    cat > "$build/main.go" <<'GO'
package main

import (
	_ "github.com/rclone/rclone/backend/local"
	_ "github.com/rclone/rclone/backend/s3"
	"github.com/rclone/rclone/cmd"
	_ "github.com/rclone/rclone/cmd/copyto"
	_ "github.com/rclone/rclone/cmd/serve/webdav"
	_ "github.com/rclone/rclone/cmd/version"
)

func main() {
	cmd.Main()
}
GO
    (
        cd "$build"
        go mod init bench/rclone
        go get "github.com/rclone/rclone@$version"
        CGO_ENABLED=0 go build -mod=mod -o rclone .
    ) >&2
    mv "$build/rclone" "$binary"
fi
echo "$binary"
