"""The source holds nothing that runs what data says: no pickle, no shell, no code from a text or another machine.

Read as syntax trees, every module of every room. What is let through stands in ALLOWED with its reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "data", "kernels", "launch", "model", "parallel")

# Modules that run code while they read, or write what only such a reader reads.
MODULES = frozenset(
    [
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "jsonpickle",
        "code",
        "codeop",
        "pty",
        "commands",
        "imp",
        "xmlrpc",
    ]
)
# Calls that do so, by their last two names.
CALLS = frozenset(
    [
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "os.execl",
        "os.spawnl",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.full_load",
        "tarfile.extractall",
        "hub.load",
        "pandas.read_pickle",
        "pd.read_pickle",
        "dist.all_gather_object",
        "dist.gather_object",
        "dist.broadcast_object_list",
        "dist.scatter_object_list",
        "distributed.all_gather_object",
        "distributed.gather_object",
        "distributed.broadcast_object_list",
        "distributed.scatter_object_list",
        "numpy.fromregex",
    ]
)
METHODS = frozenset(  # of whatever object
    ("extractall", "load_checkpoint", "save_checkpoint", "all_gather_object", "gather_object", "broadcast_object_list",
     "scatter_object_list", "send_object_list", "recv_object_list")
)  # fmt: skip
# Keywords that open such a way, and the values that are safe.
KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
NEEDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# mpi4py's methods that pickle. Those of the first line are nobody else's; the others are told apart by the name of what
# they are called on, and in a module that imports mpi4py they are all meant.
ONLY_MPI = frozenset(("bcast", "ibcast", "allgather", "alltoall", "sendrecv", "ssend", "bsend", "exscan", "mprobe"))
LOWER_CASE_MPI = ONLY_MPI | {
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "issend",
    "reduce",
    "allreduce",
    "scan",
}
MPI_OBJECT = re.compile(r"(^|[._])(mpi|comm|communicator|world|intercomm|node)([._]|$)", re.IGNORECASE)
OUR_OWN = re.compile(
    r"(^|\.)_?communicator\.gather$|\.(dp|ep|edp)\.gather$"
)  # parallel.Communicator's, which sends JSON

ALLOWED = {
    # file and what is found there: why it is no danger
    ("launch/bench_peers.py", "webdataset.WebDataset"): "reads, undecoded, only what the benchmark itself wrote",
}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "trimtab.py"]


def findings(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module's text that this test is about."""
    tree = ast.parse(text)
    mpi = any("mpi4py" in ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{(node.module or '').split('.')[-1]}.{name.name}" for name in node.names)
            yield from ((node.lineno, name) for name in names if name in CALLS or name in NEEDS)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in called(node, mpi))


def called(node: ast.Call, mpi: bool) -> Iterator[str]:
    """What of a call this test is about. mpi: whether the module imports mpi4py."""
    name = dotted(node.func)
    last = ".".join(name.split(".")[-2:])
    if name in CALLS or last in CALLS or ("." in name and name.rsplit(".", 1)[1] in METHODS):
        yield last
    if last == "webdataset.WebDataset" or (last.endswith(".decode") and "WebDataset" in ast.dump(node.func)):
        yield last
    given = {word.arg: word.value for word in node.keywords}
    for word, safe in KEYWORDS.items():
        if word in given and not (isinstance(given[word], ast.Constant) and given[word].value is safe):
            yield f"{last}({word}=...)"
    if last in NEEDS:
        word, safe = NEEDS[last]
        if word not in given:
            yield f"{last} without {word}={safe}"
    first, _, method = name.rpartition(".")
    meant = method in ONLY_MPI or mpi or MPI_OBJECT.search(first)
    if "." in name and method in LOWER_CASE_MPI and meant and (mpi or not OUR_OWN.search(name)):
        yield f"mpi4py's {last}, which pickles"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, as far as it is names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_module_runs_what_it_reads() -> None:
    found, used = [], set()
    for path in sources():
        file = path.relative_to(ROOT).as_posix()
        for line, what in findings(path.read_text()):
            if (file, what) in ALLOWED:
                used.add((file, what))
            else:
                found.append(f"{file}:{line}: {what}")
    assert found == []
    assert used == set(ALLOWED), "what is allowed and not there any more is taken off the list"


def test_every_room_is_read() -> None:
    read = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert read == {*ROOMS, "trimtab.py"} and len(sources()) > 150
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders - {"tests"} == set(ROOMS), "a new folder of code is read too"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "import marshal as m", "eval(x)", "exec(x)", "os.system('ls')",
        "subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=shell)", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(t)",
        "tar.extractall('.')", "AutoModel.from_pretrained(n, trust_remote_code=True)", "torch.hub.load(a, b)",
        "torch.distributed.all_gather_object(a, b)", "from os import system", "from torch import load",
        "engine.save_checkpoint(p)", "import shelve, os", "world.allgather(x)",
        "self._comm.bcast(value, root=0)", "mpi_communicator().bcast(x)", "MPI.COMM_WORLD.send(x, dest=1)",
        "self._world.allreduce(x)", "from mpi4py import MPI\nself._link.recv(source=0)", "c10d.all_gather_object(a, b)",
    ],
)  # fmt: skip
def test_it_would_be_found(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "subprocess.run(x)", "model.eval()",
        "yaml.safe_load(t)", "re.compile(x)", "subprocess.run(x, shell=False)", "communicator.gather(x)",
        "self.communicator.gather(x)", "scores.gather(1, ids)", "connection.send(x)",
        "self._comm.Bcast(buffer, root=0)",
    ],
)  # fmt: skip
def test_it_is_not_found_where_it_is_not(text: str) -> None:
    assert not list(findings(text))
