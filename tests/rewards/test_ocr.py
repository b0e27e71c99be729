"""Text in images: the wanted texts, the score of what was read, and reading rendered words."""

import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor

from flowalign.errors import UserError
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.ocr import legibility, OCR, plain, wanted_texts
from flowalign.rewards.registry import load_rewards

pytest.importorskip("rapidocr_onnxruntime")

SANS = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
FONTS = {"DejaVu": ImageFont.truetype(str(SANS), 48), "built in": ImageFont.load_default(48)}
INKS = {"black on white": ("black", "white"), "yellow on navy": ("yellow", "navy")}
WORDS = (
    *(
        "OPEN",
        "CLOSED",
        "Coffee",
        "Bakery",
        "Hello World",
        "NASA 2049",
        "Library",
        "Welcome",
        "SALE",
        "Exit 24",
    ),
    *("Happy Birthday", "Museum", "Danger", "Hotel", "Fresh Bread"),
)
EVERY = [(word, font, ink) for word in WORDS for font in FONTS for ink in INKS]


@pytest.fixture(scope="module")
def ocr() -> OCR:
    return OCR()


def picture(
    text: str, font: str = "DejaVu", ink: str = "black on white", at: tuple[int, int] = (40, 200)
) -> Image.Image:
    front, ground = INKS[ink]
    image = Image.new("RGB", (512, 512), ground)
    ImageDraw.Draw(image).text(at, text, font=FONTS[font], fill=front)
    return image


@pytest.mark.parametrize(
    ("read", "text", "score"),
    [
        ("hello", "hello", 1),
        ("oh,hello!", "hello", 1),
        ("helo", "hello", 0.8),
        ("hellp", "hello", 0.8),
        ("elloh", "hello", 1 - 2 / 5),
        ("hexlo", "hello", 0.8),
        ("kitten", "sitting", 1 - 3 / 7),
        ("", "abc", 0),
        ("xyz", "abc", 0),
        ("a" * 500, "hello", 0),
        ("heilo" * 3, "hello", 0),
        ("ab", "a", 1),
        ("b", "a", 0),
    ],
)
def test_legibility_is_one_less_the_share_of_letters_to_change(read, text, score):
    assert legibility(read, text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["open"]),
        ("a sign that says “Fresh Bread”", ["freshbread"]),
        ("ein Schild „Brot“", ["brot"]),
        ('a door "IN" beside a door "OUT"', ["in", "out"]),
        ("a door “IN” beside a door “OUT”", ["in", "out"]),
        ("the baker's sign", []),
        ("a 'single' quote", []),
        ('a sign "OPEN', []),
        ('an empty sign ""', []),
        ('a sign " "', []),
    ],
)
def test_the_wanted_texts_are_the_quoted_ones(prompt, texts):
    assert wanted_texts(prompt, {}) == texts


def test_metadata_has_priority_over_the_prompt():
    prompt = 'a sign "OPEN"'
    assert wanted_texts(prompt, {"text": "Closed now"}) == ["closednow"]
    assert wanted_texts(prompt, {"text": ["IN", "OUT"]}) == ["in", "out"]
    assert wanted_texts(prompt, {"text": 2049}) == ["2049"]
    assert wanted_texts(prompt, {"text": ""}) == wanted_texts(prompt, {"text": None}) == ["open"]


def test_spaces_lines_and_capitals_do_not_count():
    assert plain(" Hello\tBig\n World ") == "hellobigworld"


@pytest.mark.parametrize(("word", "font", "ink"), EVERY[::8], ids="-".join)
def test_a_rendered_word_is_read(ocr, word, font, ink):
    assert ocr([picture(word, font, ink)], [f'a sign that says "{word}"'], [{}]).tolist() == [1]


@pytest.mark.slow
def test_sixty_rendered_words_are_read_and_other_words_score_by_the_formula(ocr):
    """A changed or added letter in the wanted word costs its share; half of them, half."""
    for word, font, ink in EVERY:
        read = plain(word)
        n = len(read)
        wanted = [read, "#" + read[1:], read + "#", "#" * (n // 2) + read[n // 2 :], "#" * n]
        scores = ocr([picture(word, font, ink)], [""], [{"text": wanted}]).item()
        expected = [1, 1 - 1 / n, 1 - 1 / (n + 1), 1 - (n // 2) / n, 0]
        assert scores == pytest.approx(sum(expected) / 5, abs=1e-6), (
            word,
            font,
            ink,
            ocr._read(picture(word, font, ink)),
        )
    assert len(EVERY) == 60


def test_an_empty_picture_scores_zero(ocr):
    assert ocr([Image.new("RGB", (512, 512), "white")], ['"OPEN"'], [{}]).tolist() == [0]


def test_pictures_are_scored_by_their_own_prompts(ocr):
    images = [picture("OPEN"), picture("OPEN"), picture("Hotel")]
    scores = ocr(images, ['"OPEN"', '"OPAN"', '"OPEN"'], [{}, {}, {"text": "hotel"}])
    assert scores.tolist() == pytest.approx([1, 0.75, 1])


def test_several_texts_score_their_mean(ocr):
    both, one = picture("IN THE\nMUSEUM"), picture("MUSEUM")
    prompts = ['"IN THE" and "MUSEUM"'] * 2
    whole, half = ocr([both, one], prompts, [{}, {}]).tolist()
    assert whole == 1
    assert half == pytest.approx((1 + legibility("museum", "inthe")) / 2)


def test_other_text_counts_in_the_strict_form_only(ocr):
    image, prompts = picture("Fresh\nBread"), ['"Bread"']
    strict = OCR(strict=True)
    assert ocr([image], prompts, [{}]).tolist() == [1]
    assert strict([image], prompts, [{}]).tolist() == pytest.approx([0.5])
    assert strict([image], ['"Fresh" above "Bread"'], [{}]).tolist() == [1]
    assert strict([Image.new("RGB", (512, 512))], prompts, [{}]).tolist() == [0]


def test_an_image_without_wanted_text_is_not_scored(ocr):
    reward = make_reward("ocr", ocr)
    images = torch.stack([to_tensor(picture("OPEN"))] * 2)
    scores = reward(images, ["a red circle", '"OPEN"'], [{}, {}])
    assert scores.isnan().tolist() == [True, False]
    assert scores[1] == 1
    assert reward(images, ["a circle", "a square"], [{}, {}]).isnan().all()


def test_equal_images_score_equally_in_any_batch(ocr):
    word = picture("Coffee")
    alone = ocr([word], ['"Toffees"'], [{}])
    among = ocr([picture("SALE"), word, word], ['"SALE"', '"Toffees"', '"Toffees"'], [{}] * 3)
    assert among[1] == among[2] == alone[0] == pytest.approx(1 - 2 / 7)


def test_tiny_pictures_can_be_read_too(ocr):
    assert ocr([Image.new("RGB", (16, 16))], ['"A"'], [{}]).tolist() == [0]


def test_a_configuration_loads_it_or_names_the_missing_library(monkeypatch):
    spec = "flowalign.rewards.ocr:OCR"
    assert load_rewards({spec: {"weight": 0.5, "strict": True}})[0].traits.images == "pil"
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'flowalign\[ocr\]'"):
        load_rewards({spec: 1.0})
