#!/usr/bin/env bash
# kubectl.sh ARGUMENTS...: kubectl against the cluster
exec "$(dirname "$0")/inside.sh" kubectl "$@"
