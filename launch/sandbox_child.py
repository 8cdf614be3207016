"""Runs a Python program that nobody has read, inside limits. A script of its own: `sandbox.run_untrusted` starts it.

Called as `python -I sandbox_child.py LIMITS FOLDER PROGRAM DESCRIPTOR`, LIMITS a JSON object with wall_s, cpu_s,
memory_bytes and file_bytes. It takes rights away from a child of its own, in this order, and the child becomes the
program:

- its own process, network and System V spaces (namespaces): no network, and when the first process ends all end;
- Landlock: nothing but the interpreter's files may be read, nothing but FOLDER written;
- resource limits: processor time, memory, file size, open files, no core dump;
- no new privileges, an empty environment, FOLDER as working directory, no input.

On the descriptor it writes `missing NAME` for each protection that the machine does not offer, and at the end
`status N`, or `status timeout` when the time was up and it has killed the program and all that this started.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys

# Linux: clone(2), prctl(2), landlock(7); the system calls have the same numbers on x86-64 and arm64.
NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
ALL_OF_FIRST_VERSION = (1 << 13) - 1
BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH


def main(limits: dict[str, float], folder: str, program: str, descriptor: int) -> None:
    """Starts the program with fewer rights and says how it ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    apart = separate(libc)
    child = os.fork()  # the first process of the new process space: when it ends, all in there end
    if child == 0:
        become(libc, limits, folder, program, descriptor, apart)
    timed_out = False

    def end(*_: object) -> None:
        nonlocal timed_out
        timed_out = True
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limits["wall_s"])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with open(descriptor, "w") as said:
        said.write(f"status {'timeout' if timed_out else code if code >= 0 else 128 - code}\n")


def become(
    libc: ctypes.CDLL, limits: dict[str, float], folder: str, program: str, descriptor: int, apart: bool
) -> None:
    """Takes rights away from this process, then becomes the program; does not return."""
    missing = [] if apart else ["own network and process space (namespaces)"]
    os.chdir(folder)
    if sys.platform.startswith("linux"):
        libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not restrict_files(libc, folder):
        missing.append("restricted files (Landlock)")
    with open(descriptor, "w") as said:  # closed before the program begins
        said.writelines(f"missing {line}\n" for line in missing)
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (int(most), int(most)))
    os.execve(sys.executable, [sys.executable, "-I", "-B", program], {"PATH": "/usr/bin:/bin"})


def separate(libc: ctypes.CDLL) -> bool:
    """Own network, process and System V spaces from here on; as root directly, otherwise inside an own user space."""
    if not sys.platform.startswith("linux"):
        return False
    spaces = NEW_PID | NEW_NET | NEW_IPC
    return any(libc.unshare(extra | spaces) == 0 for extra in (0, NEW_USER))


def restrict_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: the interpreter's folders may be read, `folder` may be read and written, all else is closed."""
    if not sys.platform.startswith("linux"):
        return False
    handled = ctypes.create_string_buffer(struct.pack("=Q", ALL_OF_FIRST_VERSION))
    rules = libc.syscall(LANDLOCK_CREATE, handled, ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    readable = EXECUTE | READ_FILE | READ_DIR
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    prefixes |= {os.path.dirname(os.path.realpath(sys.executable)), os.path.dirname(sys.executable)}
    allowed = [(path, readable) for path in sorted(prefixes)]
    allowed += [(folder, ALL_OF_FIRST_VERSION), ("/dev/null", READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE)]
    for path, access in allowed:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                access &= EXECUTE | READ_FILE | WRITE_FILE
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, handle))  # packed, as the call wants it
            added = libc.syscall(LANDLOCK_ADD, rules, BENEATH, rule, 0)
            os.close(handle)
            if added != 0:
                return False
    done: int = libc.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return done == 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
