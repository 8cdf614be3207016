#!/usr/bin/env bash
# A plain Ray cluster with token authentication, and a run on it.
#
#   launch/jobs/ray_cluster.sh token                     once: makes the token; copy its file to every machine
#   launch/jobs/ray_cluster.sh head                      on the first machine (stays in the foreground)
#   launch/jobs/ray_cluster.sh worker HEAD_HOST          on every other machine (stays in the foreground; SIGTERM drains)
#   launch/jobs/ray_cluster.sh submit CONFIG [key.path=value ...] [--run DIR]     on the head, follows the log
#
# The dashboard listens on the head's loopback only. From elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD_HOST, then submit
# there. Data and the run's folder have to lie on storage that all machines see. Ctrl-C during submit saves and stops;
# a lost terminal, or --no-wait, leaves the job running, and `trimtab jobs JOB` follows it again.
# TRIMTAB_RAY_TOKEN names the token's file; RAY_NODE_IP the address to use where a machine has several.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/../.." && pwd)
bin=${TRIMTAB_BIN:-$root/.venv/bin}
home=${HOME:-$(echo ~)} # without HOME, bash looks it up
token=${TRIMTAB_RAY_TOKEN:-$home/.config/trimtab/ray-token}
case $bin in /*) ;; *) bin=$PWD/$bin ;; esac
case $token in /*) ;; *) token=$PWD/$token ;; esac # Ray's processes run in another folder
port=${RAY_HEAD_PORT:-6379}
dashboard=${RAY_DASHBOARD_PORT:-8265}
grace=${TRIMTAB_STOP_GRACE_S:-90} # from the notice that a worker's machine goes until its Ray is ended
[ $# -ge 1 ] || usage
command=$1
shift

if [ "$command" = token ]; then
    [ ! -e "$token" ] || { echo "ray_cluster.sh: $token exists; remove it to make another" >&2; exit 2; }
    mkdir -p "$(dirname "$token")"
    (umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$token")
    echo "ray_cluster.sh: the token is in $token; copy this file to every machine, readable by you only"
    exit 0
fi

# Without a token, everybody who reaches a port of Ray can run code on the cluster: there is no way around it here.
[ -s "$token" ] || { echo "ray_cluster.sh: no token in $token; make one with: $0 token" >&2; exit 2; }
if [ -n "$(find "$token" -perm /077)" ]; then
    echo "ray_cluster.sh: others can read $token; run: chmod 600 $token" >&2
    exit 2
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
export RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/ # nobody: a head whose reports are off reports just that
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # of another cluster; here every address is given
# Jobs find `python` on the PATH with which Ray was started: it has to be this project's.
export PATH=$bin:$PATH
# A web proxy cannot reach the dashboard on loopback, and would be sent the token (see cluster/web_proxies.py).
direct=127.0.0.1,localhost,::1,127.0.0.0/8,169.254.169.254,metadata.google.internal
export no_proxy=${no_proxy:-${NO_PROXY:-}}
case $no_proxy in
'*') ;;
'') no_proxy=$direct ;;
*) no_proxy=$no_proxy,$direct ;;
esac
export NO_PROXY=$no_proxy
node_ip=()
[ -z "${RAY_NODE_IP:-}" ] || node_ip=(--node-ip-address "$RAY_NODE_IP")

case $command in
head)
    # A machine that vanishes is noticed after about 10 s instead of 30.
    export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=4
    (   # Ray's own "Next steps" are for other uses; these follow them. The loop ends with Ray, whose process this one becomes.
        while grep -q '^State:[[:space:]]*[RSDTt]' "/proc/$$/status" 2>/dev/null; do
            if (exec 3<>"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; then
                sleep 4
                echo "ray_cluster.sh: the cluster is up. What next, instead of the steps that Ray prints:"
                echo "  another machine:  launch/jobs/ray_cluster.sh worker ${RAY_NODE_IP:-$(uname -n)}    (with a copy of $token)"
                echo "  a run, from here: launch/jobs/ray_cluster.sh submit debug --run /shared/runs/debug"
                echo "  the dashboard:    http://127.0.0.1:$dashboard ; paste the content of $token when it asks for a token"
                break
            fi
            sleep 0.5
        done
    ) &
    exec "$bin/ray" start --head --block --disable-usage-stats ${node_ip[@]+"${node_ip[@]}"} --port "$port" \
        --dashboard-host 127.0.0.1 --dashboard-port "$dashboard"
    ;;
worker)
    [ $# -eq 1 ] || usage
    head=$1
    set -m # Ray gets its own process group, so that Ctrl-C reaches this script alone
    "$bin/ray" start --block --disable-usage-stats ${node_ip[@]+"${node_ip[@]}"} --address "$head:$port" &
    node=$!
    # SIGTERM, as a spot machine or an init system gives it, and Ctrl-C: the ranks here save and leave before Ray ends.
    leave() {
        trap 'kill -TERM "$node" 2>/dev/null' INT TERM # a second time: at once
        echo "ray_cluster.sh: leaving the cluster; up to $grace s to save" >&2
        PYTHONPATH=$root "$bin/python" -m cluster.drain --address "$head:$port" --seconds "$grace" || true
        kill -TERM "$node" 2>/dev/null || true
    }
    trap leave INT TERM
    status=0
    wait "$node" || status=$?
    while kill -0 "$node" 2>/dev/null; do # the wait was interrupted by a signal, not ended
        status=0
        wait "$node" || status=$?
    done
    exit "$status"
    ;;
submit)
    [ $# -ge 1 ] || usage
    # `trimtab submit` gives the job cluster.stop_grace_s to save (Ray's own default is 3 s). Who calls `ray job submit`
    # instead has to pass --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}'.
    exec "$bin/trimtab" submit "$@" --address "http://127.0.0.1:$dashboard"
    ;;
*)
    usage
    ;;
esac
