#!/usr/bin/env bash
# Starts Ray on one host of a cluster that torchspec will run on. On each host:
#
#   ray_start.sh head                              # the first; prints the command for the others
#   ray_start.sh worker 10.0.0.1:6379              # every other one
#   ray_start.sh stop
#   ray_start.sh address                           # of this host, if it were the head
#
# Variables:
#   TORCHSPEC_ROLES      what the host is for: "inference", "training" or both (default). Each is a resource of the
#                        node, torchspec_inference or torchspec_training, for cluster.inference_resource and
#                        cluster.training_resource.
#   TORCHSPEC_INTERFACE  network interface that the hosts share (default: the one towards the head, or towards the
#                        default route on the head itself)
#   RAY_PORT             of the head (6379)
#   TORCHSPEC_WAIT       seconds that a worker waits for the head (300), at first and whenever it has lost it
#   TORCHSPEC_GIVE_UP    command that a worker runs when it has waited in vain (none)
#   RAY_TMPDIR           where Ray keeps its session, in a folder ray-USER that is yours alone (default: TMPDIR, or /tmp)
#   RAY_AUTH_TOKEN_PATH  file with the cluster's token, the same on every host (default: ~/.ray/auth_token, which the
#                        head makes if it is not there; copy it to the others, readable by you alone)
#
# More arguments go to `ray start`, as in: ray_start.sh worker 10.0.0.1:6379 --block, which stays, and joins the cluster
# again when it has taken the node for dead: after a network that was cut, or for want of memory.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

no_address() {
  die "found no address of this host; name its interface with TORCHSPEC_INTERFACE"
}

# The host's IPv4 address on an interface, or on the way to an address.
own_address() {
  local towards=$1
  if [[ -n ${TORCHSPEC_INTERFACE:-} ]]; then
    ip -4 -o addr show dev "$TORCHSPEC_INTERFACE" | awk '{ split($4, address, "/"); print address[1]; exit }'
  else
    ip -4 -o route get "$towards" 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p'
  fi
}

head_address() {
  own_address 192.0.2.1 || no_address # documentation's own network: it lies behind the default route
}

roles_as_resources() {
  local role offered=()
  for role in ${TORCHSPEC_ROLES:-inference training}; do
    case $role in
      inference | training) offered+=("\"torchspec_$role\": 1") ;;
      *) die "TORCHSPEC_ROLES names $role; valid: inference, training" ;;
    esac
  done
  local IFS=,
  echo "{${offered[*]}}"
}

# Ray loads the token from the file by itself; here only its presence is looked at, and that nobody else can read it.
require_token() {
  local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [[ -n ${RAY_AUTH_TOKEN:-} ]]; then
    return
  fi
  if [[ ! -s $file ]]; then
    die "no token in $file: copy it from the head (ray get-auth-token shows it there), readable by you alone"
  fi
  if [[ -z ${RAY_AUTH_TOKEN_PATH:-} ]]; then
    chmod go= "$HOME/.ray" "$file"
  fi
}

# Ray opens the folders of its sessions to everybody, and in them lies the code that a run ships; so we give it one that is
# the user's alone.
session_folder() {
  local folder
  folder=${RAY_TMPDIR:-${TMPDIR:-/tmp}}/ray-$(id -un)
  mkdir -p -m 700 "$folder"
  if [[ -L $folder || ! -O $folder ]]; then
    die "$folder, where Ray is to keep its session, is somebody else's: remove it, or set RAY_TMPDIR"
  fi
  chmod 700 "$folder"
  echo "$folder"
}

# `ray start`, in a way that leaves signals to us. It fails while the head is still starting, as under Slurm, which starts
# all nodes at the same time; with --block also when the node has been in the cluster and is no more. Which of the two it
# was, only what it has printed tells: it may try for minutes to reach a head.
join() {
  ray start "$@" > >(tee "$said") &
  child=$!
  wait "$child"
}

export RAY_AUTH_MODE=token
mode=${1:-}
resources=$(roles_as_resources)
common=(--disable-usage-stats --resources="$resources")
case $mode in
  head)
    shift
    address=$(head_address)
    if [[ -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
      (umask 077 && ray get-auth-token --generate >/dev/null)
    fi
    require_token
    port=${RAY_PORT:-6379}
    session=$(session_folder)
    echo "on the other hosts: $0 worker $address:$port"
    exec ray start --head --temp-dir="$session" --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 "${common[@]}" "$@"
    ;;
  worker)
    head=${2:-}
    [[ $head == *:* ]] || die "name the head as HOST:PORT: $0 worker 10.0.0.1:6379"
    shift 2
    require_token
    address=$(own_address "$(getent ahostsv4 "${head%:*}" | awk '{ print $1; exit }')") || no_address
    trap 'kill "$child" 2>/dev/null; wait "$child"; exit 143' TERM INT
    said=$(mktemp)
    trap 'rm -f "$said"' EXIT
    session=$(session_folder)
    until join --address="$head" --temp-dir="$session" --node-ip-address="$address" "${common[@]}" "$@"; do
      if grep -q "Ray runtime started" "$said"; then
        SECONDS=0 # a new beginning: the node was in the cluster
      fi
      if ((SECONDS >= ${TORCHSPEC_WAIT:-300})); then
        bash -c "${TORCHSPEC_GIVE_UP:-}" || true
        die "no node could be started for the cluster at $head"
      fi
      sleep 5
    done
    ;;
  address)
    head_address
    ;;
  stop)
    exec ray stop
    ;;
  *)
    die "usage: $0 head | worker HOST:PORT | stop | address"
    ;;
esac
