"""Write assets/pairs/: pairs of pictures of the bundled world, in the columns of Pick-a-Pic.

    python scripts/make_pairs.py

One picture of a pair shows its caption. The other differs in one fact. The captions are those of
assets/prompts, so the evaluation's pairs hold no caption that is trained on.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from flowalign.data.prompts import read_prompts
from flowalign.worlds import scenes

ASSETS = Path(__file__).parents[1] / "assets"
SEED = 7
COUNTS = {"train": 800, "evaluation": 200}


def main() -> None:
    """Write train.parquet and evaluation.parquet."""
    for split, count in COUNTS.items():
        # The split is part of the seed, so that no picture is in both files.
        rng = np.random.default_rng([SEED, count])
        prompts = read_prompts(ASSETS / "prompts" / f"{split}.jsonl")
        captions = [scenes.parse(prompt.text) for prompt in prompts]
        rows = [make_row(captions[i % len(captions)], rng) for i in range(count)]
        file = ASSETS / "pairs" / f"{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
        print(f"{file}: {count} pairs, {file.stat().st_size / 1e6:.2f} MB")


def make_row(caption: scenes.Caption, rng: np.random.Generator) -> dict[str, object]:
    """Draw a pair for a caption, in random order, with labels that mark the chosen picture."""
    # The order of the draws makes the committed files: the caption first, then the two scenes.
    wrong_caption = scenes.misquote(caption, rng)
    chosen, rejected = draw_png(caption, rng), draw_png(wrong_caption, rng)
    # In random order, as people see them: a model must not learn that the first is better.
    first = bool(rng.integers(2))
    pictures = (chosen, rejected) if first else (rejected, chosen)
    return {
        "caption": caption.text,
        "jpg_0": pictures[0],
        "jpg_1": pictures[1],
        "label_0": float(first),
        "label_1": float(not first),
    }


def draw_png(caption: scenes.Caption, rng: np.random.Generator) -> bytes:
    """Draw a scene for a caption, and return its picture as a PNG file."""
    picture: Tensor = scenes.render([scenes.draw_scene(caption, rng)])[0]
    pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
