"""Write assets/prompts/: captions to train on, and others, never trained on, for the evaluation.

    python scripts/make_prompts.py

An evaluation caption names a pair of `scenes.UNSEEN_PAIRS`, or is every fourth of its kind.
"""

import hashlib
import json
from pathlib import Path

from flowalign.worlds import scenes

FOLDER = Path(__file__).parents[1] / "assets" / "prompts"
TRAINING_PER_KIND, EVALUATION_PER_KIND = 36, 12


def is_held_out(caption: scenes.Caption, index: int) -> bool:
    """True if the caption, at this index among those of its kind, is kept for the evaluation."""
    if any((phrase.colour, phrase.shape) in scenes.UNSEEN_PAIRS for phrase in caption.phrases):
        return True
    # Captions without a colour name no pair, so every kind keeps some for the evaluation.
    return index % 4 == 0


def sort_key(caption: scenes.Caption) -> bytes:
    """Return a key that shuffles captions the same way on every machine."""
    return hashlib.sha256(caption.text.encode()).digest()


def split(kind: scenes.Kind) -> tuple[list[scenes.Caption], list[scenes.Caption]]:
    """Return the training captions and the evaluation captions of a kind."""
    training, evaluation = [], []
    for index, caption in enumerate(sorted(scenes.captions(kind), key=sort_key)):
        (evaluation if is_held_out(caption, index) else training).append(caption)
    return training[:TRAINING_PER_KIND], evaluation[:EVALUATION_PER_KIND]


def main() -> None:
    """Write train.jsonl and evaluation.jsonl."""
    splits: dict[str, list[scenes.Caption]] = {"train": [], "evaluation": []}
    for kind in scenes.KINDS:
        training, evaluation = split(kind)
        splits["train"] += training
        splits["evaluation"] += evaluation
    for name, captions in splits.items():
        lines = [json.dumps({"prompt": c.text, "tag": c.kind}) for c in captions]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, {kind: sum(c.kind == kind for c in captions) for kind in scenes.KINDS})


if __name__ == "__main__":
    main()
