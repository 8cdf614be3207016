"""The `trimtab` command: puts the project's root on the path and hands over to `launch.cli`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main() -> int:
    """Runs the command line; returns the process's exit status."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from launch.cli import program

    return program()


if __name__ == "__main__":
    sys.exit(main())
