"""No test of a configuration may load weights."""

import pytest
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


# By module: a wider scope would outlive this folder, and the tests of other folders load weights.
@pytest.fixture(autouse=True, scope="module")
def no_weights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(_accepted))
        yield


def _accepted(*_: object, **__: object) -> None:
    raise AssertionError("accepted")
