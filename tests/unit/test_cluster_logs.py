"""Following a log and keeping a process's output."""

import os
import subprocess
import sys

from cluster.logs import LogTail, begin_log, last_lines, rank_log


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


def test_what_an_earlier_start_printed_stays_and_the_next_is_named(tmp_path):
    path = rank_log(tmp_path, 1)
    assert begin_log(path, 1, 0) == 0 and path.read_bytes() == b""
    path.write_text("Traceback of the crash\nhalf a li")
    offset = begin_log(path, 1, 0)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["Traceback of the crash", "half a li"] and offset == path.stat().st_size
    assert lines[2].startswith("--- start of rank 1, launch, 2") and f"process {os.getpid()} on" in lines[2]
    assert last_lines(path) == "", "nothing of this start yet"
    with path.open("a") as file:
        file.write("second\n")
    assert last_lines(path) == "second"
    begin_log(path, 1, 3)
    assert "restart 3" in path.read_text().splitlines()[-1]


def test_a_reader_that_goes_away_leaves_the_log_whole(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cluster.logs import KeptOutput\n"
        "with KeptOutput(Path(sys.argv[1]), append=True, stream=True):\n"
        "    for number in range(200):\n"
        "        print(number, 'x' * 2000); time.sleep(0.002)\n"
    )
    log = tmp_path / "rank-0.log"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0
    assert log.read_text().count("\n") == 200
