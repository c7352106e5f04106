#!/usr/bin/env bash
# The images of the end-to-end tests, without a registry or an engine.
#   images.sh build NAME...   makes target/e2e/images/NAME.tar (an archive for `ctr images import`), if its inputs changed
#   images.sh load NAME...    the same, and imports it into the nodes that are on (ON="2": only into node 2)
# Names: forebay forebay-operator forebay-csi (from the Dockerfile of the repository, with binaries that cargo built here),
# trainer trainer-torch (what tests read with), pause coredns (what the cluster itself needs).
# A pod names them forebay.io/forebay:e2e and so on; those of the tests forebay.io/e2e/NAME:1. trainer-torch and trainer also
# go by the names that the examples use, because nothing can be pulled here.
# PROFILE: which build of the binaries is packed, dev (default: what the tests build as well) or release.
set -euo pipefail
. "$(dirname "$0")/cluster/env.sh"
verb=${1:?build or load}; shift
profile=${PROFILE:-dev}

# buildah mounts its storage: in a mount namespace of its own nothing of it is left behind.
if [ -z "${IMAGES_UNSHARED:-}" ]; then
  IMAGES_UNSHARED=1 exec unshare --mount --propagation slave "$0" "$verb" "$@"
fi
mkdir -p "$images" "$e2e/buildah"
exec 7>"$images/lock"; flock -w 1200 7 || die "another build of images does not end"
buildah() { command buildah --root "$e2e/buildah/root" --runroot "$e2e/buildah/run" --storage-driver overlay "$@"; }

tag() {
  case $1 in
    forebay | forebay-operator | forebay-csi) echo "forebay.io/$1:e2e" ;;
    *) echo "forebay.io/e2e/$1:1" ;;
  esac
}

# The name of an image in examples/, for which it stands.
alias_of() {
  case $1 in
    trainer-torch) sed -n 's/^ *image: \(pytorch\/.*\)$/docker.io\/\1/p' "$repository/examples/training.yaml" ;;
    trainer) echo docker.io/library/debian:12-slim ;;
  esac
}

# Does $1.tar exist, made of inputs that have the digest $2?
current() { [ -e "$images/$1.tar" ] && [ "$(cat "$images/$1.stamp" 2>/dev/null)" = "$2" ]; }
archive() { # NAME DIGEST: what buildah has under the name's tag becomes the archive
  rm -f "$images/$1.tar.new"
  # of the kinds of archives the one that is not compressed
  buildah push --quiet "$(tag "$1")" "docker-archive:$images/$1.tar.new:$(tag "$1")"
  mv "$images/$1.tar.new" "$images/$1.tar"
  echo "$2" > "$images/$1.stamp"
  # what is left of the stages, and what the tag named before
  buildah rm --all >/dev/null && buildah rmi --prune >/dev/null
}

# What a registry would give: Debian's base, by Debian's own packages.
base() {
  buildah inspect --type image debian:12-slim >/dev/null 2>&1 && return
  echo "making the base image debian:12-slim" >&2
  local sources=() f c
  for f in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    grep -qs bookworm "$f" && sources=("$f") && break
  done
  f=$(mktemp -d "$e2e/buildah/base.XXXXXX")
  mmdebstrap --quiet --variant=minbase --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$f/root.tar" "${sources[@]}" >&2
  c=$(buildah from scratch)
  buildah add --quiet "$c" "$f/root.tar" / >/dev/null
  buildah config --cmd bash "$c"
  buildah commit --quiet "$c" localhost/debian:12-slim >/dev/null
  buildah rm "$c" >/dev/null
  rm -rf "$f"
}

build() {
  local name=$1 digest c context
  case $name in
    pause)
      digest=$(sha256sum < "$here/pause.c")
      current "$name" "$digest" && return
      gcc -static -Os -s -o "$e2e/build/pause" "$here/pause.c"
      single "$name" "$e2e/build/pause" ;;
    coredns)
      digest=$(sha256sum < "$e2e/bin/coredns")
      current "$name" "$digest" && return
      single "$name" "$e2e/bin/coredns" ;;
    trainer | trainer-torch)
      digest=$(sha256sum < "$repository/e2e/images/$name.Dockerfile")
      current "$name" "$digest" && return
      base
      buildah bud --quiet --isolation chroot --pull-never --file "$repository/e2e/images/$name.Dockerfile" \
        --tag "$(tag "$name")" "$repository/e2e/images" >/dev/null ;;
    forebay | forebay-operator | forebay-csi)
      local folder=$profile
      [ "$profile" = dev ] && folder=debug
      local binary=$repository/target/$folder/$name
      [ -x "$binary" ] || die "no $binary: build it first (cargo build --workspace --bins)"
      digest=$(cat "$binary" "$repository/Dockerfile" | sha256sum)
      current "$name" "$digest" && return
      base
      context=$e2e/build/context-$name
      rm -rf "$context"; mkdir -p "$context"
      objcopy --strip-debug "$binary" "$context/$name"
      cp /etc/ssl/certs/ca-certificates.crt "$context/"
      buildah bud --quiet --isolation chroot --pull-never --build-arg BINARIES=context --target "$name" \
        --file "$repository/Dockerfile" --tag "$(tag "$name")" "$context" >/dev/null ;;
    *) die "no image $name" ;;
  esac
  archive "$name" "$digest"
  echo "built $(tag "$name")" >&2
}

single() { # NAME BINARY: an image of nothing but that program
  local c
  mkdir -p "$e2e/build"
  c=$(buildah from scratch)
  buildah copy --quiet "$c" "$2" "/$1" >/dev/null
  buildah config --entrypoint "[\"/$1\"]" "$c"
  buildah commit --quiet "$c" "$(tag "$1")" >/dev/null
  buildah rm "$c" >/dev/null
}

for name in "$@"; do build "$name"; done
exec 7>&-
case $verb in
  build) ;;
  load)
    loads=()
    for d in "$state"/nodes/node*; do
      n=${d##*/node}
      case " ${ON:-$n} " in *" $n "*) ;; *) continue ;; esac
      "$here/node.sh" running "$n" || continue
      for name in "$@"; do
        # the digest of what this node got last
        [ "$(cat "$d/$name.stamp" 2>/dev/null)" = "$(cat "$images/$name.stamp")" ] && continue
        "$here/on.sh" "$n" ctr -n k8s.io images import "/run/e2e/images/$name.tar" >/dev/null
        for other in $(alias_of "$name"); do
          "$here/on.sh" "$n" ctr -n k8s.io images tag --force "$(tag "$name")" "$other" >/dev/null
        done
        cp "$images/$name.stamp" "$d/$name.stamp"
      done &
      loads+=($!)
    done
    for l in "${loads[@]}"; do wait "$l"; done ;;
  *) die "build or load" ;;
esac
