# The command of a submitted job: `sh cluster/job_main.sh PROGRAM...` runs it under Python where Ray runs.
#
# Ray gives a job the PATH of the shell that started Ray, where `python` may be another one, without Ray, or none at all.
# The parent of this shell is one of Ray's processes; the folder from which it loaded Ray tells which Python that is. A
# PROGRAM that begins with `python` gets the same one.
ray=$(sed -n 's|^[^/]*\(/.*\)/lib/python[0-9.]*/site-packages/ray/_raylet[^/]*$|\1/bin/python|p' "/proc/$PPID/maps" 2>/dev/null | head -n 1)
for python in "$ray" "$(command -v python)" "$(command -v python3)"; do
    [ -n "$python" ] && [ -x "$python" ] || continue
    [ "$1" != python ] || { shift; set -- "$python" "$@"; }
    exec "$python" -m cluster.job_main "$@"
done
echo "the job found no Python on the head node: none where Ray was loaded from, no python and no python3 on PATH = $PATH" >&2
exit 127
