"""Compile the blocks that a transformer repeats: `model.compile`.

Blocks of one shape share their graphs. Each kind of call has a graph of its own: its weights, with
or without a gradient, and one image or several.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn, Tensor

from flowalign import distributed
from flowalign.errors import UserError
from flowalign.progress import say

GRAPHS = 256
"""Most graphs of all blocks of a class. PyTorch's default is 8, too few for five weights."""
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
"""Options of inductor, PyTorch's compiler.

Without them, fused operations compute in float32, and which are fused depends on the gradient. So
the velocities of rollout and training would differ in half precision.
"""

Backend = str | Callable[..., Any]


def compile_blocks(blocks: Sequence[nn.Module], backend: Backend = "inductor") -> None:
    """Compile blocks in place. Each graph is made when it is first needed.

    Modules and parameters keep their names, and adapters may be added later. If PyTorch cannot make
    a graph, all blocks run uncompiled from then on, and a message says so.

    Raises:
        UserError: There are no blocks.
    """
    from torch._dynamo import config  # takes seconds to import

    if not blocks:
        raise UserError(
            "model.compile is true, but the transformer has no list of blocks. Set it to false."
        )
    # For this whole thread: a context around each call of a block would cost 0.1 ms.
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for block in blocks:
        block.forward = _CompiledForward(block.forward, blocks, backend)


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled blocks compute as they do without a compiler."""
    return torch.compiler.set_stance("force_eager")


class _CompiledForward:
    """The compiled `forward` of a block."""

    def __init__(
        self, forward: Callable[..., Any], blocks: Sequence[nn.Module], backend: Backend
    ) -> None:
        from torch._dynamo import exc, maybe_mark_dynamic

        self.forward, self.blocks = forward, blocks
        self.mark_dynamic = maybe_mark_dynamic
        self.errors = exc.TorchDynamoException, exc.FailOnRecompileLimitHit
        self.compiled = torch.compile(
            forward,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            options=OPTIONS if backend == "inductor" else None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            # One graph for all numbers of images: dropped groups leave passes of any size. From
            # the first call on, so that a graph does not depend on the calls before it.
            if isinstance(value, Tensor) and value.dim():
                self.mark_dynamic(value, 0)
        try:
            return self.compiled(*args, **kwargs)
        except self.errors as error:
            self._give_up(error)
        return self.forward(*args, **kwargs)

    def _give_up(self, error: Exception) -> None:
        for block in self.blocks:
            compiled: Any = block.forward
            block.forward = compiled.forward
        if distributed.is_main():
            # Advice to developers of PyTorch follows in further lines.
            lines = str(error.__cause__ or error).split("\n")
            reason = " ".join(line.strip() for line in lines[:2])
            say(
                "The model runs uncompiled from here on, because PyTorch did not compile its "
                f"blocks: {reason.rstrip('.')}. Set model.compile to false to skip the attempt."
            )
