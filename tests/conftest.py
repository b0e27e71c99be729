import os

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compare bits, which a GPU rounds in another way. `CUDA_VISIBLE_DEVICES=0 make test` runs the
# tests on a GPU all the same.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory) -> None:
    """Caches of this session: tests neither read nor fill those of the user."""
    os.environ["FLOWALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def scoring_thread() -> None:
    """Small tensors: threads cost more than they bring, and sums stay in one order."""
    torch.set_num_threads(1)
