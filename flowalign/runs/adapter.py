"""Adapter files in the LoRA format of diffusers: written, read, and exported at full strength."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open, SafetensorError
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import read_matching_tensors, read_tensors
from flowalign.models.config import Lora
from flowalign.models.given_adapters import AdapterSettings
from flowalign.models.lora import ADAPTER_FILE, METADATA_KEY, PREFIX, save_lora
from flowalign.policy import Policy

A_ENDING, B_ENDING = ".lora_A.weight", ".lora_B.weight"


def save_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Write an adapter as it trains, so that diffusers' `load_lora_weights` reads it.

    The scale alpha travels in the metadata of the file. Equal adapters make equal files.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder to write into.
        name: The adapter: "policy" or a snapshot.
    """
    state = {key: value.contiguous().cpu() for key, value in policy.state(name).items()}
    targets = sorted(policy.lora.target_modules or [])
    policy.model.save_adapter(folder, state, {**policy.lora.to_dict(), "target_modules": targets})
    finish_file(Path(folder) / ADAPTER_FILE)


def export_weights(source: Path, folder: Path) -> None:
    """Write an adapter so that every loader applies it at full strength.

    The scale becomes part of the second matrix of each layer, and the metadata says alpha = rank.
    So it is 1 with the metadata and without it: ComfyUI and older versions of diffusers do not read
    the metadata.

    Args:
        source: The folder of an adapter.
        folder: The folder to write into.

    Raises:
        UserError: The adapter is missing or damaged.
    """
    header = read_header(source / ADAPTER_FILE)
    state = scaled(_state(read_tensors(source / ADAPTER_FILE)), header.scale)
    lora = header.lora
    folded = {
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.rank_pattern,
        "use_rslora": False,
        "use_dora": lora.use_dora,
    }
    save_lora(folder, state, {"target_modules": lora.targets, **header.settings, **folded})
    finish_file(folder / ADAPTER_FILE)


def finish_file(file: Path) -> None:
    """Sort the header of a safetensors file, and give the file the usual permissions.

    The library writes the entries of the header in any order.
    """
    content = with_sorted_header(file.read_bytes())
    # The library makes files that only their owner may read, and a file that is overwritten keeps
    # its permissions.
    file.unlink()
    file.write_bytes(content)


def with_sorted_header(content: bytes) -> bytes:
    """Return the content of a safetensors file with the entries of its header in order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    # The format wants the data to begin at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def load_adapter(policy: Policy, folder: Path, name: str = "policy") -> None:
    """Load an adapter at the strength that its own file states, whatever alpha the policy has.

    Args:
        policy: The policy that owns the adapter.
        folder: The folder of a checkpoint, of a snapshot or of an exported adapter.
        name: The adapter to fill: "policy" or a snapshot.

    Raises:
        UserError: The file is missing or damaged, or belongs to another model or rank.
    """
    file = folder / ADAPTER_FILE
    expected = {f"{PREFIX}{key}": value.shape for key, value in policy.state(name).items()}
    state, header = _state(read_matching_tensors(file, expected)), read_header(file)
    own = AdapterSettings.from_peft(policy.lora.to_dict())
    policy.load_state(
        scaled(state, lambda layer: header.scale(layer) / own.scale(layer, header.ranks[layer])),
        name,
    )


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by PEFT's names."""
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def scaled(state: Mapping[str, Tensor], factor: Callable[[str], float]) -> dict[str, Tensor]:
    """Return the matrices of an adapter whose effect is stronger by a factor for each layer.

    Exact if the factor is a power of two.
    """
    return {
        key: value * factor(key.removesuffix(B_ENDING)) if key.endswith(B_ENDING) else value
        for key, value in state.items()
    }


def lora_settings(folder: Path) -> Lora:
    """Return the settings of an adapter, from the header and the shapes of the weights.

    Raises UserError if the file is missing or damaged.
    """
    return read_header(folder / ADAPTER_FILE).lora


@dataclass(frozen=True, kw_only=True)
class Header:
    """The facts in the header of an adapter file."""

    lora: Lora
    """Settings under which a policy has the same layers, ranks and scales."""
    ranks: Mapping[str, int]
    """Rank of each adapted layer by its name, sorted."""
    settings: Mapping[str, object]
    """PEFT's settings from the metadata; empty if the file has none."""

    def scale(self, layer: str) -> float:
        """Return the factor of the layer's change."""
        return AdapterSettings.from_peft(
            {
                "lora_alpha": self.lora.alpha,
                "alpha_pattern": self.lora.alpha_pattern,
                "use_rslora": self.lora.use_rslora,
            }
        ).scale(layer, self.ranks[layer])


def read_header(file: Path) -> Header:
    """Read the header of an adapter file. Raises UserError if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as weights:
            names = sorted(weights.keys())
            ranks = {
                name.removeprefix(PREFIX).removesuffix(A_ENDING): weights.get_slice(
                    name
                ).get_shape()[0]
                for name in names
                if name.endswith(A_ENDING)
            }
            metadata = json.loads((weights.metadata() or {}).get(METADATA_KEY, "{}"))
            settings = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    except FileNotFoundError:
        raise UserError(f"{file} is missing. Give a folder that holds an adapter.") from None
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}). Copy the adapter again.") from None
    if not ranks:
        raise UserError(f"{file} holds no LoRA of a transformer. Give the adapter of a run.")
    dora = any("lora_magnitude_vector" in name for name in names)
    return Header(lora=_lora(file, ranks, settings, dora), ranks=ranks, settings=settings)


def _lora(file: Path, ranks: Mapping[str, int], settings: Mapping[str, Any], dora: bool) -> Lora:
    """Return the settings of an adapter. Raises UserError if the package cannot train with them."""
    rank = Counter(ranks.values()).most_common()[0][0]
    # The mark of a beginning keeps a layer from standing for others whose names end so.
    rank_pattern = {f"^{layer}": own for layer, own in ranks.items() if own != rank}
    # Without metadata, diffusers computes with alpha = rank.
    alphas = settings.get("alpha_pattern") or {} if "lora_alpha" in settings else rank_pattern
    return Lora(
        rank=rank,
        alpha=_whole(file, "lora_alpha", settings.get("lora_alpha", rank)),
        targets=[*ranks],
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=dora,
        rank_pattern=rank_pattern,
        alpha_pattern={key: _whole(file, "alpha_pattern", own) for key, own in alphas.items()},
    )


def _whole(file: Path, key: str, alpha: object) -> int:
    # Other tools write whole numbers as 16.0.
    if not isinstance(alpha, int | float) or not float(alpha).is_integer() or alpha < 1:
        raise UserError(
            f"{file} has {key} {alpha!r}. Use an adapter whose alpha is a whole number from 1."
        )
    return int(alpha)
