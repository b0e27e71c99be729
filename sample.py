"""python sample.py RUN_OR_MODEL_OR_ADAPTER [PROMPT ...]: the same as `flowalign sample`."""

import sys

from flowalign.cli import run

if __name__ == "__main__":
    run(["sample", *sys.argv[1:]])
