"""A bounded cache of prompt embeddings in main memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

CACHE_BYTES = 2**30
ENCODE_AT_ONCE = 64
"""Prompts per call of the encoders when they are encoded in advance."""
RECENT = 64
"""Further prompts that stay after they were used."""

Row = dict[str, Tensor]
"""The inputs of one prompt by name, without the batch dimension, on the CPU."""
EncodeTexts = Callable[[Sequence[list[str]]], Iterable[tuple[str, Row]]]
"""From lists of prompts that are encoded together to the row of each prompt."""


class TextCache:
    """Keeps the rows of prompts: some for good, and those of the prompts that were used last.

    Embeddings are large (2.7 MB per prompt for SD3, 4.2 MB for Flux), so the data set does not fit.

    A prompt is rounded in another way beside other prompts. Which of them are missing depends on
    where a run was resumed, but its result must not. So rows that are encoded together are never
    removed, and the order of the prompts alone decides which they are. All other prompts are
    encoded alone.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes = max_bytes
        self._kept: dict[str, Row] = {}
        self._recent: OrderedDict[str, Row] = OrderedDict()

    def keep(self, texts: Iterable[str], encode: EncodeTexts) -> None:
        """Encode texts in advance and keep them for good, as many as fit."""
        room = max(0, self.capacity(self._empty(encode)) - len(self._kept))
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept][:room]
        starts = range(0, len(missing), ENCODE_AT_ONCE)
        chunks = [missing[start : start + ENCODE_AT_ONCE] for start in starts]
        if chunks:
            self._kept.update(encode(chunks))

    def rows(self, texts: Iterable[str], encode: EncodeTexts) -> dict[str, Row]:
        """Return the rows of the texts and of the empty prompt, and encode the missing ones."""
        rows = {"": self._empty(encode)}
        distinct = list(dict.fromkeys(texts))
        missing = [t for t in distinct if t not in self._kept and t not in self._recent]
        if missing:
            self._recent.update(encode([[text] for text in missing]))
        for text in distinct:
            rows[text] = self._kept[text] if text in self._kept else self._recent[text]
        # Least recently used first: the order of the dictionary is the order of use.
        for text in distinct:
            if text in self._recent:
                self._recent.move_to_end(text)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return rows

    def _empty(self, encode: EncodeTexts) -> Row:
        if "" not in self._kept:
            self._kept.update(encode([[""]]))
        return self._kept[""]

    def capacity(self, row: Row) -> int:
        """Return how many rows of this size are kept, at least a prompt and the empty one."""
        return max(2, self.max_bytes // sum(tensor.nbytes for tensor in row.values()))
