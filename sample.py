"""python sample.py RUN_OR_MODEL [prompts ...]: the same noise before and after, side by side."""

import sys

from flowalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
