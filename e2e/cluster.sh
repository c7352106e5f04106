#!/usr/bin/env bash
# cluster.sh up      a Kubernetes cluster of two nodes on this machine, with the images of the repository and a store
# cluster.sh down    leaves nothing of it but what was built
# cluster.sh logs    everything that explains a failure, into target/e2e/logs
# See cluster/env.sh for the variables that name it and choose its version.
set -euo pipefail
. "$(dirname "$0")/cluster/env.sh"

logs() {
  local out=$e2e/logs namespace pod n
  rm -rf "$out"; mkdir -p "$out/pods"
  cp -r "$state/log" "$out/components" 2>/dev/null || true
  cp "$state/store/access.log" "$out/store-access.log" 2>/dev/null || true
  kubectl() { timeout 30 "$here/kubectl.sh" --request-timeout=10s "$@"; }
  kubectl get nodes,all,pv,pvc,configmaps,leases,networkpolicies,csidrivers,csinodes,volumeattachments --all-namespaces -o wide > "$out/objects.txt" 2>&1 || true
  kubectl get datasets,cacheruntimes,preloadpolicies --all-namespaces -o yaml > "$out/forebay.yaml" 2>&1 || true
  kubectl get events --all-namespaces --sort-by=.lastTimestamp > "$out/events.txt" 2>&1 || true
  kubectl describe nodes > "$out/nodes.txt" 2>&1 || true
  kubectl describe pods --all-namespaces > "$out/pods.txt" 2>&1 || true
  kubectl get pods --all-namespaces --no-headers -o custom-columns=:.metadata.namespace,:.metadata.name 2>/dev/null |
    while read -r namespace pod; do
      kubectl -n "$namespace" logs "$pod" --all-containers --prefix --timestamps < /dev/null > "$out/pods/$namespace-$pod.log" 2>&1 || true
      kubectl -n "$namespace" logs "$pod" --all-containers --prefix --timestamps --previous < /dev/null > "$out/pods/$namespace-$pod.previous.log" 2>/dev/null ||
        rm -f "$out/pods/$namespace-$pod.previous.log"
    done
  for n in "$state"/nodes/node*; do
    n=${n##*/node}
    "$here/on.sh" "$n" sh -c 'ps -eo pid,ppid,user,stat,wchan:20,rss,etimes,args --forest; cat /proc/mounts; ip route' > "$out/node$n.txt" 2>&1 || true
  done
  echo "logs are in $out" >&2
}

case ${1:-} in
  up)
    "$repository/e2e/deps.sh"
    "$here/up.sh"
    "$repository/e2e/store.sh" start ;;
  down) "$here/down.sh" ;;
  logs) logs ;;
  *) die "up, down or logs" ;;
esac
