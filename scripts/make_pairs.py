"""Make assets/pairs, pictures of the bundled world in Pick-a-Pic's columns: python scripts/make_pairs.py

Of every caption a rendered scene that shows it, and one that differs in one fact. The captions are those of assets/prompts,
so that the evaluation's pairs hold none that is trained on.
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
    for split, count in COUNTS.items():
        rng = np.random.default_rng([SEED, count])
        captions = [
            scenes.parse(prompt.text)
            for prompt in read_prompts(ASSETS / "prompts" / f"{split}.jsonl")
        ]
        rows = [row(captions[i % len(captions)], rng) for i in range(count)]
        file = ASSETS / "pairs" / f"{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
        print(f"{file}: {count} pairs, {file.stat().st_size / 1e6:.2f} MB")


def row(caption: scenes.Caption, rng: np.random.Generator) -> dict[str, object]:
    """A pair in either order, with the label that says which is better."""
    right, wrong = (
        png(scenes.render([scenes.draw_scene(c, rng)])[0])
        for c in (caption, scenes.misquote(caption, rng))
    )
    first = bool(rng.integers(2))
    pictures = (right, wrong) if first else (wrong, right)
    return {
        "caption": caption.text,
        "jpg_0": pictures[0],
        "jpg_1": pictures[1],
        "label_0": float(first),
        "label_1": float(not first),
    }


def png(picture: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


if __name__ == "__main__":
    main()
