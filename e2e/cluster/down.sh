#!/usr/bin/env bash
# Ends and removes everything that up.sh made: processes, namespaces, links, cgroups and state; not what was built. Does not
# depend on anything being in order: it also cleans up after a killed up.sh, or after kill -9 of everything.
set -euo pipefail
. "$(dirname "$0")/env.sh"
[ -n "${FB_LOCKED:-}" ] || lock

offs=()
# Nodes first, then whatever else is in the control namespace: the API server before etcd's absence can stall it.
for netns in $(ip netns list | awk '{print $1}' | grep -E "^$cluster-node[0-9]+$" || true); do
  "$here/node.sh" off "${netns##*-node}" &
  offs+=($!)
done
for o in "${offs[@]}"; do wait "$o"; done
if [ -e "/run/netns/$control" ]; then
  empty() {
    local pids
    pids=$(ip netns pids "$control" || true)
    [ -z "$pids" ] && return
    kill -9 $pids 2>/dev/null || true
    return 1
  }
  wait_for 20 empty || die "these do not end: $(ip netns pids "$control" | xargs)"
fi
for netns in $(ip netns list | awk '{print $1}' | grep -E "^$cluster-(node[0-9]+|control)$" || true); do
  ip netns del "$netns"
done

# A cgroup is busy for a moment after its last process ended.
for c in /sys/fs/cgroup/"$cluster"-node* /sys/fs/cgroup/*/"$cluster"-node*; do
  [ -d "$c" ] || continue
  removed() { find "$c" -depth -type d -exec rmdir {} + 2>/dev/null; [ ! -d "$c" ]; }
  wait_for 10 removed || die "cannot remove the cgroup $c"
done
rm -rf "$state"
