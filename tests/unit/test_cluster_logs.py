"""Following a log and keeping a process's output."""

import subprocess
import sys

from cluster.logs import LogTail, last_lines, rank_log


def test_tail_gives_whole_lines_once(tmp_path):
    path = rank_log(tmp_path, 3)
    assert path.name == "rank-3.log"
    tail = LogTail(path)
    assert tail.read() == ""
    path.write_text("one\ntw")
    assert tail.read() == "one\n"
    with open(path, "a") as file:
        file.write("o\nthree")
    assert tail.read() == "two\n"
    assert tail.read() == ""
    assert tail.read(everything=True) == "three"


def test_tail_does_not_break_characters(tmp_path):
    path = tmp_path / "log"
    tail = LogTail(path)
    data = "größer\n".encode()
    path.write_bytes(data[:3])
    assert tail.read() == ""
    path.write_bytes(data)
    assert tail.read() == "größer\n"


def test_last_lines(tmp_path):
    path = tmp_path / "log"
    assert last_lines(path) == ""
    path.write_text("".join(f"line {n}\n" for n in range(50_000)))
    assert last_lines(path, 2) == "line 49998\nline 49999"


def test_kept_output_goes_to_file_and_to_where_it_went_before(tmp_path):
    program = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from cluster.logs import KeptOutput\n"
        "for stream in (True, False):\n"
        "    with KeptOutput(Path(sys.argv[1]), append=True, stream=stream):\n"
        "        print('python', stream); os.write(2, b'library\\n')\n"
        "        subprocess.run(['echo', 'child'])\n"
        "print('after')\n"
    )
    log = tmp_path / "rank-0.log"
    run = subprocess.run([sys.executable, "-c", program, str(log)], capture_output=True, text=True, check=True)
    assert run.stdout == "python True\nlibrary\nchild\nafter\n"
    assert log.read_text() == "python True\nlibrary\nchild\npython False\nlibrary\nchild\n"
