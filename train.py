"""python train.py CONFIG.yaml [section.key=value ...]: the same as `flowalign train`."""

import sys

from flowalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
