"""`python -m launch`: the same command line as `trimtab`."""

import sys

from launch.cli import program

if __name__ == "__main__":
    sys.exit(program())
