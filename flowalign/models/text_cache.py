"""A bounded cache of prompt embeddings in main memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from torch import Tensor

CACHE_BYTES = 2**30

Row = dict[str, Tensor]
"""The inputs of one prompt by name, without the batch dimension, on the CPU."""
EncodeTexts = Callable[[list[str]], Iterable[tuple[str, Row]]]


class TextCache:
    """Remembers the rows of recently used prompts. The empty prompt always stays.

    Embeddings are large (2.7 MB per prompt for SD3, 4.2 MB for Flux), so the data set does not fit.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def rows(self, texts: Iterable[str], encode: EncodeTexts) -> dict[str, Row]:
        """Return the rows of the texts and of the empty prompt, and encode the missing ones."""
        distinct = list(dict.fromkeys(["", *texts]))
        rows = {text: self._rows[text] for text in distinct if text in self._rows}
        missing = [text for text in distinct if text not in rows]
        if missing:
            rows |= dict(encode(missing))
        # Least recently used first: the order of the dictionary is the order of use.
        for text, row in rows.items():
            self._rows[text] = row
            self._rows.move_to_end(text)
        while len(self._rows) > self.capacity(rows[""]):
            self._rows.popitem(last=False)
        return rows

    def capacity(self, row: Row) -> int:
        """Return how many rows of this size fit, at least a prompt and the empty one."""
        return max(2, self.max_bytes // sum(tensor.nbytes for tensor in row.values()))
