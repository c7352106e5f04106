#!/usr/bin/env bash
# node.sh on N [NODES]: powers node N on. Returns when its containerd answers.
# node.sh off N: a power cut. Every process and mount of the node is gone at once; powered on again it is the same node
#   after a reboot, with what it had on its disk (its /var, /mnt and /srv are its own; the rest is the machine's).
# node.sh running N: is it on?
# node.sh pid N: the pid of its first process
set -euo pipefail
. "$(dirname "$0")/env.sh"
verb=${1:?on, off, running or pid} n=${2:?number of the node}
name=node$n netns=$cluster-node$n d=$state/nodes/node$n ip=$(node_ip "$n")

running() { alive "$d/pid" "$netns"; }

off() {
  # A process in an uninterruptible wait for a FUSE mount would keep the node's PID namespace alive: such connections, which
  # are those of the node's own mount namespace, are aborted if the node does not go by itself.
  local mounts=() pids
  if running; then
    mapfile -t mounts < <(awk '{ for (i = 7; i < NF; i++) if ($i == "-" && $(i + 1) ~ /^fuse(blk|[.].*)?$/) { split($3, m, ":"); print m[2] } }' \
      "/proc/$(cat "$d/pid")/mountinfo" 2>/dev/null)
    kill -9 "$(cat "$d/pid")" 2>/dev/null || true
  fi
  empty() {
    pids=$(ip netns pids "$netns" 2>/dev/null || true)
    [ -z "$pids" ] && return
    kill -9 $pids 2>/dev/null || true
    return 1
  }
  if ! wait_for 5 empty; then
    for m in "${mounts[@]}"; do echo 1 2>/dev/null > "/sys/fs/fuse/connections/$m/abort" || true; done
    wait_for 20 empty || die "node $n does not go: $(ps -o pid,stat,wchan,args -p "$(echo $pids | tr ' ' ,)")"
  fi
  rm -f "$d/pid"
}

on() {
  running && return
  local nodes=${1:-$(ls -d "$state"/nodes/node* | wc -l)} m c i
  mkdir -p "$d"/{etc,mnt,srv,var/lib/kubelet,var/lib/cni,var/lib/containerd,var/log/pods,var/log/containers,var/tmp,var/cache}
  chmod 1777 "$d/var/tmp"
  [ -L "$d/var/run" ] || ln -s /run "$d/var/run"

  # --- Network: a veth on the bridge, routes to the other nodes' pods
  [ -e "/run/netns/$netns" ] || ip netns add "$netns"
  in_control ip link show "node$n" >/dev/null 2>&1 ||
    in_control ip link add "node$n" type veth peer name eth0 netns "$netns"
  in_control ip link set "node$n" master fb0 up
  ip -n "$netns" addr replace "$ip/16" dev eth0
  ip -n "$netns" link set eth0 up
  ip -n "$netns" link set lo up
  ip -n "$netns" route replace default via $control_ip
  nsenter --net="/run/netns/$netns" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
  for m in $(seq 1 "$nodes"); do
    [ "$m" = "$n" ] || ip -n "$netns" route replace "$pods.$m.0/24" via "$(node_ip "$m")"
  done
  in_control ip route replace "$pods.$n.0/24" via "$ip"
  # Pods are routed, not bridged: an answer of a pod to one of its own node passes the node's connection tracking, too.
  cat > "$d/etc/10-pods.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipam": {"type": "host-local", "ranges": [[{"subnet": "$pods.$n.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON

  # --- cgroups
  if [ $cgroups = v2 ]; then
    mkdir -p "/sys/fs/cgroup/$netns"
    for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
      echo "+$c" > /sys/fs/cgroup/cgroup.subtree_control || true
    done 2>/dev/null
    grep -qw memory "/sys/fs/cgroup/$netns/cgroup.controllers" ||
      die "no memory controller below /sys/fs/cgroup: is this a container, whose root cgroup has processes?"
  else
    for c in /sys/fs/cgroup/*/; do
      case $c in */unified/) continue ;; esac
      [ -e "$c/cgroup.procs" ] || continue
      mkdir -p "$c/$netns"
      case $c in *cpuset*) for i in cpus mems; do cat "$c/cpuset.$i" > "$c/$netns/cpuset.$i"; done ;; esac
    done
  fi

  # --- Configuration. Inside the node the state is /run/e2e/state: short paths, wherever the repository is.
  local snapshotter=overlayfs
  [ "$(stat -f -c %T "$d")" = overlayfs ] && snapshotter=native
  cat > "$d/etc/containerd.toml" <<TOML
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "forebay.io/e2e/pause:1"
  # without CAP_SYS_RESOURCE
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$snapshotter"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/run/e2e/state/nodes/$name/etc"
TOML
  echo "nameserver $dns_ip" > "$d/etc/resolv.conf"
  cat > "$d/etc/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: /run/e2e/state/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: /run/e2e/state/pki/$name.crt
tlsPrivateKeyFile: /run/e2e/state/pki/$name.key
cgroupDriver: cgroupfs
cgroupRoot: /$netns
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [$dns_ip]
clusterDomain: cluster.local
resolvConf: /run/e2e/state/nodes/$name/etc/resolv.conf
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}
nodeStatusUpdateFrequency: 2s
nodeLeaseDurationSeconds: 12
volumeStatsAggPeriod: 5s
YAML
  sed 's/\(.*\)=\(.*\)/featureGates: {\1: \2}/' "$state/gates" >> "$d/etc/kubelet.yaml"
  cat > "$d/init.sh" <<BASH
# First process of the node.
hostname $name
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/containerd /run/netns /run/lock /run/e2e/{state,kubernetes,images}
mount --bind $state /run/e2e/state
mount --bind $(dirname "$(readlink -f "$state/kubernetes/kube")") /run/e2e/kubernetes
mount --bind $images /run/e2e/images
for i in var mnt srv; do mount --bind /run/e2e/state/nodes/$name/\$i /\$i; done
mount --make-rshared /
cd /
keep() { # NAME COMMAND...: starts it again whenever it ends
  local log=/run/e2e/state/log/$name-\$1.log; shift
  while :; do "\$@" >> "\$log" 2>&1; sleep 1; done
}
keep containerd containerd -c /run/e2e/state/nodes/$name/etc/containerd.toml &
until ctr version >/dev/null 2>&1; do sleep 0.1; done
for i in pause coredns; do
  ctr -n k8s.io images import /run/e2e/images/\$i.tar >/dev/null
done
touch /run/e2e/containerd-ready
keep proxy /run/e2e/kubernetes/kube-proxy --kubeconfig=/run/e2e/state/proxy.kubeconfig --hostname-override=$name \\
  --proxy-mode=nftables --conntrack-max-per-core=0 --cluster-cidr=$pods.0.0/16 &
keep kubelet /run/e2e/kubernetes/kubelet --config=/run/e2e/state/nodes/$name/etc/kubelet.yaml \\
  --kubeconfig=/run/e2e/state/$name.kubeconfig --hostname-override=$name --node-ip=$ip \\
  --node-labels=topology.kubernetes.io/zone=zone$n --v=2
BASH
  # nsenter, not 'ip netns exec': the latter mounts a new /sys, and the cgroup mounts are gone.
  setsid nsenter --net="/run/netns/$netns" unshare --mount --uts --pid --fork --kill-child --propagation private \
    bash "$d/init.sh" > "$state/log/$name-init.log" 2>&1 < /dev/null 8>&- &
  local outer=$! inner=
  child() { inner=$(pgrep -P $outer -f "$d/init.sh" | head -1) && [ -n "$inner" ]; }
  wait_for 10 child || die "node $n does not start; see $state/log/$name-init.log"
  echo "$inner" > "$d/pid"
  booted() { [ -e "/proc/$inner/root/run/e2e/containerd-ready" ]; }
  wait_for 60 booted || die "node $n does not start; see $state/log/$name-*.log"
}

case $verb in
  on) on "${3:-}" ;;
  off) off ;;
  running) running ;;
  pid) running && cat "$d/pid" ;;
  *) die "on, off, running or pid" ;;
esac
