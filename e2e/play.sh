#!/usr/bin/env bash
# A cluster for a person to play with: two nodes, the chart, and examples/training.yaml over a bucket with some images.
# Removed by e2e/cluster.sh down.
set -euo pipefail
. "$(dirname "$0")/cluster/env.sh"
cd "$repository"

e2e/deps.sh
e2e/cluster/build.sh >/dev/null
e2e/tools.sh helm versitygw
cargo build --package forebay --package forebay-operator --package forebay-csi --bins
e2e/cluster.sh up
e2e/images.sh load forebay forebay-operator forebay-csi trainer trainer-torch
FOREBAY_E2E_CLUSTER=$here e2e/install.sh

images=$(mktemp -d); trap 'rm -rf "$images"' EXIT
python3 - "$images" <<'PYTHON'
import os, random, sys
for seed, name in enumerate(("daisies", "tulips")):
    os.makedirs(f"{sys.argv[1]}/{name}")
    for n in range(24):
        pixels = random.Random(100 * seed + n).randbytes(96 * 96 * 3)
        with open(f"{sys.argv[1]}/{name}/{n:02}.ppm", "wb") as out:
            out.write(b"P6 96 96 255\n" + pixels)
PYTHON
e2e/store.sh bucket flowers
e2e/store.sh put flowers "$images"
e2e/cluster/kubectl.sh apply -f examples/training.yaml
e2e/cluster/kubectl.sh --namespace vision wait --for=condition=Ready dataset/flowers --timeout=2m
cat <<END

Kubernetes $kubernetes with two nodes is running, Forebay in namespace forebay-system, and examples/training.yaml in namespace
vision. From here:
  e2e/cluster/kubectl.sh -n vision get dataset,cacheruntime,pods   kubectl
  e2e/cluster/kubectl.sh -n vision logs -f pod/train               the training
  e2e/cluster/inside.sh helm list -A                               any command, where the cluster is reachable
  e2e/cluster/node.sh off 2                                        a power cut of node 2 (on 2: back again)
  e2e/store.sh put flowers/daisies/new.ppm FILE                    another object at the source
  make cluster-down                                                removes all of it
END
