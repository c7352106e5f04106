#!/usr/bin/env bash
# The S3 store of the end-to-end tests: versitygw over a folder, in the control network namespace, at
# http://s3.example.com:9000 for pods and in cluster/inside.sh, path style, region us-east-1, access key `quickstart`, secret
# `quickstart-secret`: what examples/ use. Every request is in its access log, so a test can count what reached the source.
#   store.sh start | stop           stop is kill -9; the data stay until the cluster goes
#   store.sh bucket NAME            makes a bucket
#   store.sh put BUCKET/KEY FILE    or BUCKET/PREFIX FOLDER: everything below it
#   store.sh remove BUCKET/KEY
#   store.sh log                    prints the access log: a line a request, as S3's own access logs
#   store.sh count OPERATION [BUCKET/KEY]   e.g. count GetObject data/a.bin, count ListObjectsV2 data
set -euo pipefail
. "$(dirname "$0")/cluster/env.sh"
verb=${1:?start, stop, bucket, put, remove, log or count}
dir=$state/store pidfile=$dir/pid log=$dir/access.log
address=$control_ip:9000
running() { alive "$pidfile" "$control"; }
s3() { # arguments of curl
  in_control curl --silent --show-error --fail-with-body --max-time 600 \
    --aws-sigv4 aws:amz:us-east-1:s3 --user quickstart:quickstart-secret --header x-amz-content-sha256:UNSIGNED-PAYLOAD "$@"
}

case $verb in
  start)
    running && exit
    [ -e "/run/netns/$control" ] || die "no cluster $cluster"
    "$repository/e2e/tools.sh" versitygw
    mkdir -p "$dir/data"
    # --health: what is asked for there is not in the access log
    setsid nsenter --net="/run/netns/$control" env ROOT_ACCESS_KEY=quickstart ROOT_SECRET_KEY=quickstart-secret \
      "$e2e/bin/versitygw" --port "$address" --health /health --keep-alive --access-log "$log" --quiet \
      posix "$dir/data" >> "$state/log/store.log" 2>&1 < /dev/null &
    echo $! > "$pidfile"
    ready() { in_control curl -m 2 -sf "http://$address/health" >/dev/null; }
    wait_for 20 ready || die "the store is not ready; see $state/log/store.log" ;;
  stop)
    running || exit 0
    kill -9 "$(cat "$pidfile")"
    gone() { ! running; }
    wait_for 10 gone || die "the store does not end"
    rm -f "$pidfile" ;;
  bucket) s3 -X PUT "http://$address/${2:?name}" ;;
  put)
    if [ -d "${3:?file or folder}" ]; then
      (cd "$3" && find . -type f -printf '%P\n') |
        while IFS= read -r f; do printf 'url = "http://%s/%s/%s"\nupload-file = "%s/%s"\n' "$address" "$2" "$f" "$3" "$f"; done |
        s3 --parallel --parallel-max 8 --config -
    else
      s3 --upload-file "$3" "http://$address/$2"
    fi ;;
  remove) s3 -X DELETE "http://$address/${2:?bucket/key}" ;;
  log) cat "$log" ;;
  count)
    # OWNER BUCKET [TIME] ADDRESS REQUESTER ID s3_OPERATION KEY URL STATUS ... arn:aws:s3:::/BUCKET/KEY Yes
    grep -F -- " s3_${2:?operation} " "$log" | grep -cF -- "${3:+ arn:aws:s3:::/$3 }" || true ;;
  *) die "no verb $verb" ;;
esac
