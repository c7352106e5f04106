#!/usr/bin/env bash
# Starts a Kubernetes cluster on this machine: etcd and the control plane on a bridge in the network namespace
# CLUSTER-control, and NODES nodes, each with its own network, mount, PID and UTS namespace, cgroup, containerd, kubelet
# and kube-proxy. Nothing listens in the machine's own network namespace. Returns when the nodes are Ready and DNS
# answers. A cluster that runs already is left as it is; what is left of a broken one is removed first. Names: env.sh.
set -euo pipefail
. "$(dirname "$0")/env.sh"
nodes=${NODES:-2}
kubectl() { "$here/kubectl.sh" "$@"; }

bin=$("$here/build.sh")
"$repository/e2e/images.sh" build pause coredns
lock

healthy() {
  [ -e "$state/up" ] && [ "$(cat "$state/up")" = "$kubernetes $nodes" ] || return 1
  local n
  for n in $(seq 1 "$nodes"); do "$here/node.sh" running "$n" || return 1; done
  kubectl get --raw=/readyz --request-timeout=5s >/dev/null 2>&1
}
if healthy; then
  echo "the cluster $cluster is up"
  exit
fi
FB_LOCKED=1 "$here/down.sh"

mkdir -p "$state"/{pki,log,kubernetes}
ln -s "$bin"/kube* "$bin/etcd" "$state/kubernetes/"
gates=
case $kubernetes in v1.3[0-6].*) ;; *) gates=CSIVolumeHealth=true ;; esac
echo "$gates" > "$state/gates"

# --- Certificates and kubeconfigs ---------------------------------------------------------------------------------------
cd "$state/pki"
request() { openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -config <(printf '[req]\ndistinguished_name=n\n[n]\n') "$@" 2>/dev/null; }
request -x509 -days 3650 -keyout ca.key -out ca.crt -subj /CN=ca \
  -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
openssl genrsa -out sa.key 2048 2>/dev/null
openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
certificate() { # NAME SUBJECT [SUBJECT ALTERNATIVE NAMES]
  request -keyout "$1.key" -out "$1.csr" -subj "$2"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" -extfile <(
    echo "subjectAltName=${3:-DNS:localhost}"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=serverAuth,clientAuth"
  ) 2>/dev/null
}
kubeconfig() { # NAME
  cat > "$state/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: "$cluster", cluster: {server: "$api", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: "$cluster", context: {cluster: "$cluster", user: $1}}]
current-context: "$cluster"
YAML
}
names=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc
certificate apiserver /CN=kube-apiserver \
  "$names,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:$control_ip,IP:${services%.0.0/16}.0.1"
certificate admin /O=system:masters/CN=admin
certificate controller-manager /CN=system:kube-controller-manager
certificate scheduler /CN=system:kube-scheduler
certificate proxy /CN=system:kube-proxy
for n in $(seq 1 "$nodes"); do
  certificate "node$n" "/O=system:nodes/CN=system:node:node$n" "DNS:node$n,IP:$(node_ip "$n")"
done
for u in admin controller-manager scheduler proxy $(seq -f node%g 1 "$nodes"); do kubeconfig "$u"; done

# --- The bridge and the control plane -----------------------------------------------------------------------------------
ip netns add "$control"
in_control ip link set lo up
in_control ip link add fb0 type bridge
in_control ip addr add $control_ip/16 dev fb0
in_control ip link set fb0 up
in_control sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'

printf '127.0.0.1 localhost\n%s s3.example.com\n' "$control_ip" > "$state/hosts"

"$here/control.sh" start etcd
"$here/control.sh" start apiserver
"$here/control.sh" start controller-manager
"$here/control.sh" start scheduler
starts=()
for n in $(seq 1 "$nodes"); do
  "$here/node.sh" on "$n" "$nodes" &
  starts+=($!)
done
for s in "${starts[@]}"; do wait "$s"; done
# Services are reachable from the control namespace as well, through node 1's kube-proxy.
in_control ip route replace $services via "$(node_ip 1)"

sed -e "s/@dns@/$dns_ip/; s/@control@/$control_ip/" "$here/coredns.yaml" | kubectl apply --server-side -f - >/dev/null
registered() { [ "$(kubectl get nodes -o name 2>/dev/null | wc -l)" = "$nodes" ]; }
wait_for 60 registered || die "the nodes do not register; see $state/log"
kubectl wait --for=condition=Ready nodes --all --timeout=90s >/dev/null
kubectl -n kube-system rollout status deployment/coredns --timeout=90s >/dev/null
echo "$kubernetes $nodes" > "$state/up"
echo "the cluster $cluster is up: Kubernetes $kubernetes, $nodes nodes"
