"""A bounded cache of prompt embeddings in main memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

CACHE_BYTES = 2**30
ENCODE_AT_ONCE = 64
"""Prompts per call of the encoders when they are encoded in advance."""
RECENT = 64
"""The least number of further prompts that stay after they were used."""

Row = dict[str, Tensor]
"""The inputs of one prompt by name, without the batch dimension, on the CPU."""
EncodeTexts = Callable[[Sequence[list[str]]], Iterable[tuple[str, Row]]]
"""From lists of prompts that are encoded together to the row of each prompt."""


class TextCache:
    """Keeps the rows of prompts: some for good, and those of the prompts that were used last.

    Embeddings are large (2.7 MB per prompt for SD3, 4.2 MB for Flux), so a large data set does not
    fit. Its prompts are encoded as they are needed, and with them those that will be needed next:
    moving the encoders to the device takes longer than their work.

    A prompt is rounded in another way beside other prompts. Which of them are missing depends on
    where a run was resumed, but its result must not. So rows that are encoded together are never
    removed, and the order of the prompts alone decides which they are. All other prompts are
    encoded alone.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes = max_bytes
        self._kept: dict[str, Row] = {}
        self._recent: OrderedDict[str, Row] = OrderedDict()

    def keep(
        self, texts: Iterable[str], encode: EncodeTexts, together: int = ENCODE_AT_ONCE
    ) -> None:
        """Encode texts in advance and keep them for good, if all of them fit.

        `together` is the number of texts in a call of the encoders.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if len(missing) > self._room(encode):
            return
        starts = range(0, len(missing), together)
        chunks = [missing[start : start + together] for start in starts]
        if chunks:
            self._kept.update(encode(chunks))
            self._trim(max(RECENT, self._room(encode)))

    def rows(
        self, texts: Iterable[str], encode: EncodeTexts, upcoming: Iterable[str] = ()
    ) -> dict[str, Row]:
        """Return the rows of the texts and of the empty prompt, and encode the missing ones.

        Args:
            texts: The prompts that are needed.
            encode: Encodes prompts, in one visit of the encoders to the device.
            upcoming: A finite number of prompts that will be needed next, the soonest first. If one
                of `texts` is missing, as many of them as fit are encoded in the same visit.
        """
        empty, texts = self._empty(encode), list(dict.fromkeys(texts))
        if not all(map(self._has, texts)):
            self._encode(texts, upcoming, encode)
        self._used(texts)
        return {"": empty} | {
            text: self._kept[text] if text in self._kept else self._recent[text] for text in texts
        }

    def _encode(self, texts: Sequence[str], upcoming: Iterable[str], encode: EncodeTexts) -> None:
        room = max(RECENT, len(texts), self._room(encode))
        wanted = dict.fromkeys(texts)
        for text in upcoming:
            if len(wanted) == room:
                break
            wanted[text] = None
        # The soonest last: what is used first must not leave first.
        self._used(reversed(wanted))
        missing = [text for text in wanted if not self._has(text)]
        self._trim(room - len(missing))
        self._recent.update(encode([[text] for text in missing]))
        self._used(reversed(wanted))

    def _trim(self, count: int) -> None:
        while len(self._recent) > count:
            self._recent.popitem(last=False)

    def _has(self, text: str) -> bool:
        return text in self._kept or text in self._recent

    def _used(self, texts: Iterable[str]) -> None:
        # Least recently used first: the order of the dictionary is the order of use.
        for text in texts:
            if text in self._recent:
                self._recent.move_to_end(text)

    def _room(self, encode: EncodeTexts) -> int:
        """Return how many more rows fit."""
        return max(0, self.capacity(self._empty(encode)) - len(self._kept))

    def _empty(self, encode: EncodeTexts) -> Row:
        if "" not in self._kept:
            self._kept.update(encode([[""]]))
        return self._kept[""]

    def capacity(self, row: Row) -> int:
        """Return how many rows of this size are kept, at least a prompt and the empty one."""
        return max(2, self.max_bytes // sum(tensor.nbytes for tensor in row.values()))
