"""Attention back ends that diffusers dispatches by name."""

from collections.abc import Sequence
from typing import Any

import torch

from flowalign.errors import UserError

NATIVE = "native"
FLASH = "_native_flash"
"""diffusers' name of PyTorch's flash attention."""


def backend_names() -> Sequence[str]:
    """Return all attention back ends of the installed diffusers."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [name.value for name in AttentionBackendName]


def use_backend(transformer: Any, dtype: torch.dtype, name: str) -> None:
    """Switch the attention of a transformer. Raises UserError if the back end cannot be used.

    PyTorch's own choice is avoided in half precision on GPUs where it would be cuDNN: torch 2.11 on
    an H200 ended in an illegal memory access there, with heads of 128.
    """
    if name == NATIVE and dtype != torch.float32 and prefers_cudnn():
        name = FLASH
    from diffusers.models.attention_dispatch import attention_backend, AttentionBackendName

    try:
        # Without a name, a transformer follows the last that any other one was given. The context
        # undoes that for those whose calls have no name.
        with attention_backend(AttentionBackendName(NATIVE)):
            transformer.set_attention_backend(name)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.attention: {name!r} is not usable here ({error}). Use native."
        ) from error


def use_native(transformer: Any) -> None:
    """Let PyTorch choose how a transformer attends whose calls have no name of a back end.

    They follow the choice of the whole process. cuDNN is left out of it, see `use_backend`.
    """
    transformer.set_attention_backend(NATIVE)
    torch.backends.cuda.enable_cudnn_sdp(False)


def prefers_cudnn() -> bool:
    """Return True on GPUs where PyTorch prefers cuDNN's attention: Hopper and later ones."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
