"""Run the command line: python -m onestage.cli."""

import sys

from onestage.cli import main

if __name__ == "__main__":
    sys.exit(main())
