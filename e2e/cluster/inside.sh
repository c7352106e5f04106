#!/usr/bin/env bash
# inside.sh COMMAND...: runs a command in the control network namespace, from where the API server, pods, services and the
# store are reachable, with KUBECONFIG set and kubectl, helm and the other built tools in PATH.
set -euo pipefail
. "$(dirname "$0")/env.sh"
[ -e "/run/netns/$control" ] || die "no cluster $cluster: e2e/cluster.sh up"
export KUBECONFIG=$state/admin.kubeconfig PATH=$state/kubernetes:$e2e/bin:$PATH
# In a mount namespace of its own: a pod's name for the store is good here, too.
exec nsenter --net="/run/netns/$control" unshare --mount --propagation slave \
  sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$state/hosts" "$@"
