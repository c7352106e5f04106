# Names and addresses of the test cluster; sourced by every script here. CLUSTER names one: two of different names run
# side by side, because all addresses are inside network namespaces of their own.
#   CLUSTER      prefix of network namespaces and cgroups (default fb)
#   NODES        number of nodes at `up` (default 2)
#   KUBERNETES   version to build and run (default v1.37.2; v1.34.4 is the oldest that is tested)
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$repository/e2e/cluster
e2e=$repository/target/e2e
cluster=${CLUSTER:-fb}
kubernetes=${KUBERNETES:-v1.37.2}
state=$e2e/cluster
[ "$cluster" = fb ] || state=$e2e/cluster-$cluster
images=$e2e/images # archives of them
control=$cluster-control

control_ip=10.200.0.1 # of the API server, the stores and whatever else runs outside the nodes
pods=10.201           # .N.0/24 on node N
services=10.96.0.0/16
dns_ip=10.96.0.10
api=https://$control_ip:6443
node_ip() { echo "10.200.0.$((10 + $1))"; }

die() { echo "$*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "the test cluster needs root: namespaces, mounts and cgroups"

# kind of the cgroup mounts: v2, or v1 with a folder for each controller
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then cgroups=v2; else cgroups=v1; fi

in_control() { nsenter --net="/run/netns/$control" "$@"; }
# Is the process of that file alive? The pid is ours only while it is in our network namespace: the machine may have given
# it to another since. alive PIDFILE NAMESPACE
alive() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ "/proc/$pid/ns/net" -ef "/run/netns/$2" ]
}
# Waits until COMMAND succeeds, for at most SECONDS: wait_for SECONDS COMMAND...
wait_for() {
  local end=$((SECONDS + $1)); shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}
# A cluster of one name is changed by one script at a time.
lock() {
  mkdir -p "$e2e/build"
  exec 8>"$e2e/build/$cluster.lock"
  flock -w 600 8 || die "another script has been at work on the cluster $cluster for 10 minutes"
}
