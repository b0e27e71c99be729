"""Write assets/prompts/: captions to train on, and others, never trained on, to evaluate with.

An evaluation caption names a colour-shape pair of `scenes.UNSEEN_PAIRS`, or is every fourth of its kind.
"""

import hashlib
import json
from pathlib import Path

from flowalign.worlds import scenes

FOLDER = Path(__file__).parents[1] / "assets" / "prompts"
TRAINED_PER_KIND, EVALUATED_PER_KIND = 36, 12


def is_held_out(caption: scenes.Caption, place: int) -> bool:
    """Whether the caption, at this place among its kind's, is kept for evaluation."""
    if any((phrase.colour, phrase.shape) in scenes.UNSEEN_PAIRS for phrase in caption.phrases):
        return True
    return place % 4 == 0


def order(caption: scenes.Caption) -> bytes:
    return hashlib.sha256(caption.text.encode()).digest()


def main() -> None:
    split: dict[str, list[scenes.Caption]] = {"train": [], "evaluation": []}
    for kind in scenes.KINDS:
        captions = sorted(scenes.captions(kind), key=order)
        held = [is_held_out(caption, place) for place, caption in enumerate(captions)]
        split["train"] += [c for c, h in zip(captions, held, strict=True) if not h][
            :TRAINED_PER_KIND
        ]
        split["evaluation"] += [c for c, h in zip(captions, held, strict=True) if h][
            :EVALUATED_PER_KIND
        ]
    for name, captions in split.items():
        lines = [json.dumps({"prompt": c.text, "tag": c.kind}) for c in captions]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, {kind: sum(c.kind == kind for c in captions) for kind in scenes.KINDS})


if __name__ == "__main__":
    main()
