#!/usr/bin/env bash
# Tests of the chart that need no cluster: it lints, renders with every combination of the values that switch things on and
# off, refuses values that it does not know, and grants exactly the rights in e2e/rights.yaml.
#   chart.sh            checks
#   chart.sh --write    writes e2e/rights.yaml anew, for a review of what changed
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/target/e2e/bin:$PATH
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
fail() { echo "chart: $*" >&2; exit 1; }

helm lint --strict --quiet charts/forebay
render() { helm template forebay charts/forebay --namespace forebay-system "$@"; }

combinations=0
for crds in true false; do for classes in true false; do for policies in true false; do for master in "" mine; do
for pull in 0 2; do for cache in 0 20Gi; do
  pulls=(); for n in $(seq 1 $pull); do pulls+=(--set "imagePullSecrets[$((n - 1))].name=pull$n"); done
  render --set crds.install=$crds --set priorityClasses.create=$classes --set networkPolicies.create=$policies \
    --set operator.masterSecret=$master --set csi.nodeSelector.gpu=yes \
    --set-string fuse.nodeCache.capacity=$cache "${pulls[@]}" > "$out/all.yaml"
  count() { grep -c "^kind: $1$" "$out/all.yaml" || true; }
  [ "$(count PriorityClass)" = $([ $classes = true ] && echo 2 || echo 0) ] || fail "PriorityClasses with create=$classes"
  [ "$(count NetworkPolicy)" = $([ $policies = true ] && echo 3 || echo 0) ] || fail "NetworkPolicies with create=$policies"
  [ "$(count Job)" = $([ $crds = true ] && echo 2 || echo 1) ] || fail "Jobs with crds.install=$crds"
  [ "$(count Secret)" = $([ -z "$master" ] && echo 1 || echo 0) ] || fail "Secrets with masterSecret=$master"
  [ "$(count DaemonSet)" = 2 ] && [ "$(count Deployment)" = 1 ] || fail "workloads"
  grep -q "secretName: ${master:-forebay-operator-master}" "$out/all.yaml" || fail "masterSecret=$master is not mounted"
  grep -q "gpu: .*yes" "$out/all.yaml" || fail "nodeSelector"
  # Each in every pod, and told to the operator for workers.
  [ "$(grep -cE "^ *- name: pull[12]$" "$out/all.yaml")" = $((pull * ($(count Job) + 3))) ] || fail "imagePullSecrets: $pull"
  [ "$(grep -cE "^ *- --image-pull-secret=pull[12]$" "$out/all.yaml")" = $pull ] || fail "--image-pull-secret: $pull"
  # For the plugin and two daemons.
  [ "$(grep -c -- "- --node-cache=" "$out/all.yaml")" = $([ $cache = 0 ] && echo 0 || echo 3) ] || fail "nodeCache.capacity=$cache"
  combinations=$((combinations + 1))
done; done; done; done; done; done

refused=0
for wrong in operator.replica=2 operator.replicas=0 image.pullPolicy=Sometimes logFormat=xml csi.kubeletDir=var fuse.resources.limits=null \
  priorityClasses.node.value=high networkPolicies.create=maybe fuse.nodeCache.capacity=much \
  fuse.nodeCache.freePercent=100 more=1; do
  if render --set "$wrong" > /dev/null 2>"$out/error"; then fail "takes $wrong"; fi
  grep -q "values don't meet the specifications" "$out/error" || fail "$wrong: $(cat "$out/error")"
  refused=$((refused + 1))
done

# Privileged is the node plugin alone; everything else drops all capabilities, and no pod but the daemon's and the plugin's
# has a hostPath.
render > "$out/all.yaml"
python3 - "$out/all.yaml" > "$out/rights.yaml" <<'PYTHON'
import re, sys
documents = re.split(r"^---$", open(sys.argv[1]).read(), flags=re.M)
rights = []
for document in documents:
    kind = re.search(r"^kind: (\S+)$", document, re.M)
    name = re.search(r"^  name: (\S+)$", document, re.M)
    if not kind:
        continue
    kind, name = kind.group(1), name.group(1)
    if kind in ("Deployment", "DaemonSet", "Job"):
        privileged = "privileged: true" in document
        assert privileged == (name == "forebay-csi"), f"{name}: privileged {privileged}"
        containers = len(re.findall(r"^      - name: \S+\n        image:", document, re.M))
        dropped = document.count("capabilities: {drop: [ALL]}")
        assert privileged or containers == dropped > 0, f"{name}: {dropped} of {containers} containers drop capabilities"
        assert document.count("limits:") == document.count("requests:") == containers, f"{name}: requests and limits"
        assert ("hostPath" in document) == (name in ("forebay-csi", "forebay-fuse")), f"{name}: hostPath"
        assert ("hostPID: true" in document) == (name == "forebay-csi"), f"{name}: hostPID"
    if kind in ("Role", "ClusterRole"):
        rules = document[document.index("\nrules:") + 1:].split("\n# Source")[0]
        rules = re.sub(r" +#.*", "", rules).strip()
        rights.append(f"# {kind} {name}\n{rules}\n")
print("\n".join(sorted(rights)), end="")
PYTHON
if [ "${1:-}" = --write ]; then cp "$out/rights.yaml" e2e/rights.yaml; fi
diff -u e2e/rights.yaml "$out/rights.yaml" || fail "the rights changed; if that is meant: e2e/chart.sh --write"
echo "chart: $combinations combinations of values render, $refused wrong ones are refused, the rights are as reviewed"
