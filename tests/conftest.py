import os

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def scoring_thread() -> None:
    """Small tensors: threads cost more than they bring, and sums stay in one order."""
    torch.set_num_threads(1)
