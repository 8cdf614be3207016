"""`python -m launch`: the same command line as `trimtab`."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
