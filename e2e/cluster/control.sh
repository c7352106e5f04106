#!/usr/bin/env bash
# control.sh start|stop|restart etcd|apiserver|controller-manager|scheduler: one component of the control plane. `stop` is
# kill -9: what a test of an absent or crashed API server wants.
set -euo pipefail
. "$(dirname "$0")/env.sh"
verb=${1:?start, stop or restart} name=${2:?etcd, apiserver, controller-manager or scheduler}
pidfile=$state/$name.pid pki=$state/pki bin=$state/kubernetes

running() { alive "$pidfile" "$control"; }

stop() {
  if running; then
    kill -9 "$(cat "$pidfile")" 2>/dev/null || true
    gone() { ! running; }
    wait_for 10 gone || die "$name does not end"
  fi
  rm -f "$pidfile"
}

spawn() {
  # 8: the lock, which must not outlive the script
  setsid nsenter --net="/run/netns/$control" "$@" >> "$state/log/$name.log" 2>&1 < /dev/null 8>&- &
  echo $! > "$pidfile"
}

start() {
  running && return
  case $name in
    etcd)
      spawn "$bin/etcd" --data-dir "$state/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380 ;;
    apiserver)
      spawn "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
        --bind-address=$control_ip --advertise-address=$control_ip --secure-port=6443 \
        --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/sa.pub" \
        --service-account-signing-key-file="$pki/sa.key" --service-cluster-ip-range=$services \
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
        --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" \
        --kubelet-preferred-address-types=InternalIP \
        --audit-policy-file="$here/audit.yaml" --audit-log-path="$state/log/audit.log" \
        ${gates:+--feature-gates="$gates"}
      ready() {
        in_control curl -m 2 -sf --cacert "$pki/ca.crt" --cert "$pki/admin.crt" --key "$pki/admin.key" "$api/readyz" >/dev/null
      }
      wait_for 60 ready || die "the API server is not ready; see $state/log/apiserver.log" ;;
    controller-manager)
      spawn "$bin/kube-controller-manager" --kubeconfig="$state/controller-manager.kubeconfig" --leader-elect=false \
        --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" \
        --use-service-account-credentials=true --cluster-signing-cert-file="$pki/ca.crt" \
        --cluster-signing-key-file="$pki/ca.key" --node-monitor-period=2s --node-monitor-grace-period=12s ;;
    scheduler)
      spawn "$bin/kube-scheduler" --kubeconfig="$state/scheduler.kubeconfig" --leader-elect=false ;;
    *) die "no component $name" ;;
  esac
}

[ -d "$state/pki" ] || die "no cluster $cluster"
gates=$(cat "$state/gates")
case $verb in
  start) start ;;
  stop) stop ;;
  restart) stop; start ;;
  *) die "start, stop or restart" ;;
esac
