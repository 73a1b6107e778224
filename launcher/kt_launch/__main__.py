"""python -m kt_launch is the command kt-launch."""

import sys

from kt_launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
