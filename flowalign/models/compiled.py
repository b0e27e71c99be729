"""Compiles the repeated blocks of a transformer in place: `model.compile`.

One graph serves all blocks of one shape. Each kind of call has a graph of its own: the weights, with
or without a gradient, and a pass of one image or of more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn, Tensor

from flowalign import distributed
from flowalign.progress import say

GRAPHS = 256
"""Graphs that all blocks of one class may have. PyTorch allows 8, fewer than five weights need."""
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
"""Options of PyTorch's compiler, inductor.

Fused operations keep float32 between them, and which are fused depends on the graph. Rounded after
each operation as without a compiler, graphs with and without a gradient give equal velocities.
"""

Backend = str | Callable[..., Any]


def compile_blocks(blocks: Sequence[nn.Module], backend: Backend = "inductor") -> None:
    """Compile blocks in place, each kind of call when it first occurs.

    Modules and parameters keep their names, and adapters may be added later. If a graph cannot be
    compiled, all blocks run uncompiled from then on, and a message says so.
    """
    # Importing PyTorch's compiler takes seconds.
    from torch._dynamo import config

    # For the whole process: a context around each call of a block would cost 0.1 ms.
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for block in blocks:
        block.forward = _CompiledForward(block.forward, blocks, backend)


class _CompiledForward:
    """Stands for the `forward` of a block."""

    def __init__(
        self, forward: Callable[..., Any], blocks: Sequence[nn.Module], backend: Backend
    ) -> None:
        self.forward, self.blocks = forward, blocks
        # No graph for each number of images: passes may have many, and evaluations a remainder.
        options = OPTIONS if backend == "inductor" else None
        self.compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import maybe_mark_dynamic
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        for value in (*args, *kwargs.values()):
            # Marked from the first call on, so that graphs do not depend on the order of calls.
            if isinstance(value, Tensor) and value.dim():
                maybe_mark_dynamic(value, 0)
        try:
            return self.compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.give_up(error)
        return self.forward(*args, **kwargs)

    def give_up(self, error: Exception) -> None:
        """Restore the blocks' own `forward`, and say why."""
        for block in self.blocks:
            block.forward = block.forward.forward
        if distributed.is_main():
            reason = str(error).strip().partition("\n")[0]
            say(
                f"The transformer runs uncompiled from here on, because PyTorch could not compile "
                f"it: {reason} Set model.compile to false to skip the attempt."
            )
