"""python sample.py RUN_OR_MODEL_OR_ADAPTER [PROMPT ...]: the same as `flowalign sample`."""

import sys

from flowalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
