"""python train.py CONFIG.yaml [section.key=value ...]: the same as `flowalign train`."""

import sys

from flowalign.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
