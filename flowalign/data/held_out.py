"""Hold out a part of the given pictures, so that a run is measured on what it never learned."""

import hashlib
import math
from collections.abc import Sequence

from flowalign.data.examples import Example

SHARE = 10
"""A tenth: one of this number of entries is held out."""
MOST = 500
"""Entries that are held out at most: every evaluation compares all of them."""


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and a tenth that is held out; none if there is only one.

    All entries of a prompt stay together: pairs of one prompt often share a picture. If no prompt
    fits into the tenth, single entries are held out. The choice depends on the prompts and the
    order of the entries alone, so every process and every resumed run makes the same one.
    """
    room = min(math.ceil(len(examples) / SHARE), MOST, len(examples) - 1)
    rows_of: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        rows_of.setdefault(example.prompt.text, []).append(row)
    held: set[int] = set()
    for prompt in sorted(rows_of, key=_order):
        if len(held) + len(rows_of[prompt]) <= room:
            held.update(rows_of[prompt])
    if not held:
        held.update(sorted(range(len(examples)), key=lambda row: _order(str(row)))[:room])
    trained = [example for row, example in enumerate(examples) if row not in held]
    return trained, [examples[row] for row in sorted(held)]


def _order(key: str) -> bytes:
    """Return a place for a key that has nothing to do with its order in the file."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
