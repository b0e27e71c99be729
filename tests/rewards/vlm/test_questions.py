"""How the answers of a judge become scores: P(yes), and written scores of every form."""

import math

import pytest
from PIL import Image

from flowalign.rewards.vlm.questions import FORMS, parse_rubric, Rubric, yes_probability


def test_yes_probability_is_the_sigmoid_of_the_difference_of_log_probabilities():
    assert yes_probability([("Yes", -0.3), ("No", -2.0), ("Maybe", -3.0)]) == pytest.approx(
        1 / (1 + math.exp(-2.0 + 0.3))
    )
    assert yes_probability([("Yes", -900.0), ("No", -900.0)]) == pytest.approx(0.5)


def test_spellings_of_yes_and_no_are_summed():
    shares = {
        "Yes": 0.1,
        "yes": 0.05,
        "▁YES": 0.05,
        "No": 0.1,
        "Ġno": 0.1,
        " NO": 0.2,
        "Not": 0.3,
        "yesterday": 0.1,
    }
    log_probs = [(token, math.log(share)) for token, share in shares.items()]
    assert yes_probability(log_probs) == pytest.approx(0.2 / 0.6)


def test_a_log_probability_of_nan_is_an_error():
    with pytest.raises(ValueError, match="log-probability of NaN"):
        yes_probability([("Yes", math.nan), ("No", -1.0)])
    assert yes_probability([("Yes", -1.0), ("No", -math.inf)]) == 1


def test_an_answer_that_is_neither_yes_nor_no_is_not_scored():
    assert math.isnan(yes_probability([("Maybe", -0.1)]))
    assert yes_probability([("Yes", -1.0), ("Maybe", -0.5)]) == 1
    assert yes_probability([("no", -1.0)]) == 0


@pytest.mark.parametrize(
    ("form", "text", "score"),
    [
        ("final", "The circle is red.\nFinal Score: 4", 4),
        ("final", "**Final Score:** 3.5", 3.5),
        ("final", "**Final Score**: **5**", 5),
        ("final", "final score (1-5): [2]", 2),
        ("final", "Final Score: 4/5. A good picture", 4),
        ("final", "Final Score: 4 out of 5", 4),
        ("final", "Final Score: 4 - a good picture", 4),
        ("final", "Final Score: 4\n- 2 dogs are missing", 4),
        ("final", "Final Score: 2? No. Final Score: 3", 3),
        ("axes", "Alignment Score (1-5): 3\nCoherence Score (1-5): 4.5\nStyle Score (1-5): 3", 3.5),
        ("axes", "Alignment Score: 1\nCoherence Score: 2\nStyle Score: 3", 2),
        ("style", "Alignment Score (1-5): 1\nCoherence Score (1-5): 2\nStyle Score (1-5): 3", 3),
        ("coherence", "*Coherence Score (1-5)*: 2.25", 2.25),
        ("tag", "Well. <Score>4</Score>", 4),
        ("tag", "<score> 2.5/5 </score>", 2.5),
        ("final", "", None),
        ("final", "A good picture.", None),
        ("final", "Final Score: x", None),
        ("final", "Final Score: good", None),
        ("final", "Final Score: 0", None),
        ("final", "Final Score: 6", None),
        ("final", "Final Score: -3", None),
        ("final", "Final Score: 45", None),
        ("final", "Final Score: 1-5", None),
        ("final", "Final Score: 4 to 5", None),
        ("final", "Final Score: 4/10", None),
        ("final", "Final Score: 4 out of 10", None),
        ("final", "Final Score: 3,5", None),
        ("final", "Semifinal Score: 3", None),
        ("final", "<Score>4</Score>", None),
        ("axes", "Alignment Score (1-5): 3\nCoherence Score (1-5): 4", None),
        ("axes", "Alignment Score (1-5): 3\nCoherence Score (1-5): 4\nStyle Score (1-5): 9", None),
        ("tag", "<Score>4", None),
        ("tag", "<Score>1-5</Score>", None),
        ("tag", "Final Score: 4", None),
    ],
)
def test_a_rubric_answer_is_read_or_not_scored(form, text, score):
    mean = parse_rubric(text, FORMS[form][1])
    assert math.isnan(mean) if score is None else mean == score


@pytest.mark.parametrize("form", FORMS)
def test_the_question_of_a_rubric_holds_no_score(form):
    question, scores = FORMS[form]
    assert math.isnan(parse_rubric(question, scores))


def test_every_form_of_rubric_asks_about_the_prompt():
    for form in FORMS:

        class Quiet(Rubric):
            name = "rubric"

            def open(self): ...
            def first_tokens(self, questions): ...
            def generate(self, questions, max_new_tokens):
                return [question[1] for question in questions]

        rubric = Quiet(form=form)
        assert "{prompt}" in rubric.question
        assert rubric([Image.new("RGB", (8, 8))], ["a circle"], [{}]).isnan().all()
