"""Sessions of votes on pictures of the bundled model and of a folder, and the web server."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from filelock import FileLock
from PIL import Image

from flowalign.config.load import load_config
from flowalign.data.examples import Drawn
from flowalign.data.preferences import PAIRS, read_examples
from flowalign.data.votes import read_votes
from flowalign.errors import UserError
from flowalign.labelling.active import information
from flowalign.labelling.label import LabelSettings, open_session, serve
from flowalign.labelling.server import make_app
from flowalign.labelling.session import Session
from flowalign.models import load_model
from flowalign.policy import Policy
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.taste import fit_head
from flowalign.rollouts.voted import VotedPictures
from flowalign.training.trainer import train
from flowalign.training.votes import voted_pictures
from tests.tiny import ROOT

SAMPLER = ["sampler.steps=4", "sampler.window.range=[0,2]"]
CONFIG = str(ROOT / "configs" / "tiny" / "votes.yaml")


@pytest.fixture(autouse=True)
def in_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))


def config_file(folder: Path) -> str:
    """A configuration of short paths, whose votes are in the folder."""
    path = folder / "votes.yaml"
    path.write_text(
        f"extends: {CONFIG}\n"
        "objective: {name: d3po, beta: 10}\n"
        "sampler: {steps: 4, window: {range: [0, 2]}}\n"
        f"data: {{pairs: {folder}/votes.jsonl}}\n"
        f"evaluation: {{pairs: {folder}/votes.jsonl, images_per_prompt: 1, guidance_sweep: [],\n"
        "  prompts: tests/prompts.jsonl, sampler: {steps: 2}}\n"
        "train: {steps: 2, prompts_per_step: 4, images_per_pass: 8, evaluate_every: 0}\n"
    )
    return str(path)


def opened(folder: Path, source: str | None = None, **settings) -> Session:
    chosen = {"questions": 5, "votes": str(folder / "votes.jsonl"), **settings}
    return open_session(source or config_file(folder), LabelSettings(**chosen))


def vote_all(session: Session, choice: str = "left", voter: str = "anna") -> list[list[bytes]]:
    """Give one answer to every question, and return the pictures that were shown."""
    pictures = []
    while shown := session.next(voter):
        count = range(shown.pictures)
        pictures.append([session.picture(voter, shown.place, position) for position in count])
        session.vote(voter, shown.place, choice, 1.0)
    session.close()
    return pictures


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def rebuilt(folder: Path) -> VotedPictures:
    """What a training run makes voted pictures again with, on a model of its own."""
    config = load_config(config_file(folder))
    return voted_pictures(Policy(load_model(config.model), config.sampler), config)


@pytest.mark.parametrize("stores", [True, False])
def test_pictures_and_paths_are_made_again_bit_by_bit(tmp_path, stores):
    pictures = vote_all(opened(tmp_path, stores=stores))
    again, seen = rebuilt(tmp_path), 0
    for example, shown in zip(
        read_examples(str(tmp_path / "votes.jsonl"), "data.pairs", PAIRS), pictures, strict=True
    ):
        for picture, content in zip(example.pictures, shown, strict=True):
            assert isinstance(picture, Drawn)
            assert (picture.stored is not None) == stores
            row = again(picture, example.where)
            assert (row.images[0].permute(1, 2, 0).numpy() == pixels(content)).all()
            assert row.steps == range(2)
            seen += 1
    assert seen == 10
    # Another process, with another model in memory, makes the same paths.
    other = rebuilt(tmp_path)(picture, "")
    assert torch.equal(other.path, row.path)
    assert torch.equal(other.log_prob, row.log_prob)


@pytest.mark.slow
def test_d3po_trains_on_votes_alone_and_resumes_exactly(tmp_path):
    vote_all(opened(tmp_path, questions=6, stores=False))
    for name, steps in (("whole", (2,)), ("halves", (1, 2))):
        for count in steps:
            overrides = [f"output={tmp_path / name}", f"train.steps={count}"]
            train(load_config(config_file(tmp_path), overrides))
    whole, halves = (read_metrics(tmp_path / name) for name in ("whole", "halves"))
    # Policy and reference are equal before the first update: the loss of every pair is log 2.
    assert whole[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert whole[1]["loss"] == halves[1]["loss"] != whole[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "dpo, form: ipo", "kto", "sft", "soar"])
def test_other_objectives_learn_from_the_same_votes(tmp_path, objective):
    vote_all(opened(tmp_path, questions=6))
    overrides = [f"objective={{name: {objective}}}", f"output={tmp_path / 'run'}", "train.steps=1"]
    summary = train(load_config(config_file(tmp_path), overrides))
    assert summary["step"] == 1
    learns_from_pairs = objective not in ("sft", "soar")
    wanted = "chosen_preferred" if learns_from_pairs else "reconstruction_error"
    assert wanted in summary["after"]


def test_a_second_round_votes_on_the_trained_pictures_and_starts_from_them(tmp_path):
    vote_all(opened(tmp_path))
    path, run = config_file(tmp_path), tmp_path / "run"
    train(load_config(path, [f"output={run}", "train.steps=1", "train.learning_rate=0.01"]))
    second = tmp_path / "second"
    second.mkdir()
    pictures = vote_all(opened(second, source=str(run)))
    source = read_votes(second / "votes.jsonl", "").source
    assert source is not None
    assert source.merge == [str(run / "adapter")]

    merge = f"model.merge=[{run / 'adapter'}]"
    votes = [f"{key}={second / 'votes.jsonl'}" for key in ("data.pairs", "evaluation.pairs")]
    summary = train(load_config(path, [*votes, merge, f"output={second / 'run'}"]))
    assert summary["step"] == 2
    first = read_votes(tmp_path / "votes.jsonl", "").votes[0]
    assert first.pictures[0].key != read_votes(second / "votes.jsonl", "").votes[0].pictures[0].key
    assert len(pictures) == 5
    # Without the merged adapter the run begins with other weights, and has no such paths.
    with pytest.raises(UserError, match=r"Set model.path to .*, model.merge to \[.*adapter\]"):
        train(load_config(path, [*votes, f"output={second / 'other'}"]))


def test_d3po_refuses_votes_of_another_sampler_and_on_given_files(tmp_path):
    vote_all(opened(tmp_path))
    overrides = ["sampler.steps=5", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"another sampler\.steps"):
        train(load_config(config_file(tmp_path), overrides))
    lines = (tmp_path / "votes.jsonl").read_text().split("\n", 1)[1]
    (tmp_path / "votes.jsonl").write_text(re.sub(r'"key": \[[^\]]*\], ', "", lines))
    with pytest.raises(UserError, match=r"pictures without keys, but d3po learns from the steps"):
        train(load_config(config_file(tmp_path), [f"output={tmp_path / 'run'}"]))


def test_a_picture_that_was_replaced_is_refused(tmp_path):
    vote_all(opened(tmp_path))
    picture = next((tmp_path / "pictures").rglob("*-0.png"))
    Image.new("RGB", (64, 64), "white").save(picture)
    examples = read_examples(str(tmp_path / "votes.jsonl"), "data.pairs", PAIRS)
    again = rebuilt(tmp_path)
    (replaced,) = [
        (one, example.where)
        for example in examples
        for one in example.pictures
        if isinstance(one, Drawn) and one.stored and one.stored() == picture.read_bytes()
    ]
    with pytest.raises(UserError, match=r"differs from the stored one by \d+/255"):
        again(*replaced)


def test_votes_of_other_pictures_are_not_continued(tmp_path):
    vote_all(opened(tmp_path))
    with pytest.raises(UserError, match=r"made in another way, because sampler"):
        opened(tmp_path, source=CONFIG)


def test_a_session_continues_where_it_was_left_and_undoes_the_last_vote(tmp_path):
    session = opened(tmp_path)
    for choice in ("left", "skip"):
        shown = session.next("anna")
        assert shown is not None
        session.vote("anna", shown.place, choice, 1.0)
    session.close()
    again = opened(tmp_path)
    shown = again.next("anna")
    assert shown is not None
    assert (shown.place, shown.done) == (2, 2)
    again.undo("anna")
    again.undo("ben")
    assert [vote.labels for vote in read_votes(tmp_path / "votes.jsonl", "").votes] == [(1, -1)]
    shown = again.next("anna")
    assert shown is not None
    assert shown.place == 1
    first = again.next("ben")
    assert first is not None
    assert first.place == 0
    again.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures of one prompt, and one of another."""
    lines = []
    for name, prompt in (("a", "one"), ("b", "one"), ("c", "one"), ("d", "two")):
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "prompt": prompt}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_pictures_of_a_folder_are_compared_within_their_prompts(folder):
    session = open_session(str(folder), LabelSettings(questions=10))
    vote_all(session)
    examples = read_examples(str(folder / "votes.jsonl"), "data.pairs", PAIRS)
    files = [{Path(p.args[0]).stem for p in e.pictures} for e in examples]  # pyright: ignore
    assert sorted(map(sorted, files)) == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert {example.prompt.text for example in examples} == {"one"}


def test_a_folder_without_enough_pictures_of_a_prompt_is_refused(folder):
    with pytest.raises(UserError, match="no prompt with 4 pictures"):
        open_session(str(folder), LabelSettings(mode="group"))


def test_the_page_answers_this_machine_and_its_token_alone(folder):
    session = open_session(str(folder), LabelSettings(mode="thumbs", questions=4))
    app = make_app(session, "secret", "anna")
    client = TestClient(app, base_url="http://127.0.0.1:8000")
    assert client.get("/secret/").status_code == 200
    assert client.get("/other/question").status_code == 404
    assert client.get("/").status_code == 404
    stranger = TestClient(app, base_url="http://evil.example:8000")
    assert stranger.get("/secret/question").status_code == 403
    session.close()


def test_votes_go_over_the_page_and_wrong_ones_are_refused(folder):
    session = open_session(str(folder), LabelSettings(questions=2))
    client = TestClient(make_app(session, "t", "anna"), base_url="http://127.0.0.1")
    state = client.get("/t/question").json()
    place = state["question"]["place"]
    assert state["question"]["prompt"] == "one"
    assert client.get(f"/t/picture/{place}/1?voter=anna").content[:4] == b"\x89PNG"
    assert client.get(f"/t/picture/{place}/2?voter=anna").status_code == 404
    body = {"voter": "anna", "place": place, "seconds": 1}
    assert client.post("/t/vote", json={**body, "choice": "best"}).status_code == 422
    assert client.post("/t/vote", json={**body, "place": 99, "choice": "left"}).status_code == 422
    assert client.post("/t/vote", json={**body, "choice": "tie"}).json()["votes"] == 1
    assert client.post("/t/undo", json={"voter": "anna"}).json()["votes"] == 0
    session.close()


def test_a_model_without_prompts_is_refused_and_a_run_brings_its_own(tmp_path):
    settings = LabelSettings(votes=str(tmp_path / "votes.jsonl"))
    with pytest.raises(UserError, match="Give a prompt file: --prompts FILE"):
        open_session("assets/tiny-sd3", settings)
    prompts = replace(settings, prompts="tests/prompts.jsonl", mode="thumbs", questions=2)
    session = open_session("assets/tiny-sd3", prompts)
    shown = session.next("anna")
    assert shown is not None
    assert shown.pictures == 1
    session.close()


def test_an_active_choice_takes_the_pair_whose_outcome_teaches_most():
    """A direction that no vote has tested, over one that many have, and over a near twin."""
    tested = torch.eye(2)[[0] * 30].double()
    head = fit_head(tested, torch.ones(30).double(), 2.0)
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.01]]).double()
    assert information(head, pairs).argsort(descending=True).tolist()[0] == 1


def test_an_active_session_asks_every_question_once_and_repetitions_last(tmp_path):
    session = opened(tmp_path, questions=24, choose="active", stores=False)
    asked = []
    while shown := session.next("anna"):
        again = session.next("anna")
        assert again is not None
        assert again.place == shown.place  # a page that is opened anew shows the same question
        asked.append(shown.place)
        session.vote("anna", shown.place, "left", 1.0)
    session.close()
    assert sorted(asked) == list(range(len(asked)))
    assert asked != sorted(asked)


def test_another_model_and_another_prompt_never_show_stored_pictures(tmp_path):
    """Their files have other names, although seed and number of the question are equal."""
    first = opened(tmp_path, votes=str(tmp_path / "a.jsonl"))
    path = tmp_path / "other.yaml"
    path.write_text(f"extends: {config_file(tmp_path)}\nsampler: {{guidance: 3}}\n")
    other = opened(tmp_path, source=str(path), votes=str(tmp_path / "b.jsonl"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square")
    third = opened(tmp_path, votes=str(tmp_path / "c.jsonl"), prompts=str(prompts))
    files = {session.album.question(0).pictures[0].file for session in (first, other, third)}
    assert len(files) == 3
    for session in (first, other, third):
        session.close()


def test_a_vote_belongs_to_its_pictures_when_more_questions_are_asked(tmp_path):
    vote_all(opened(tmp_path, questions=5, stores=False))
    more = opened(tmp_path, questions=12, stores=False)
    shown = more.next("anna")
    assert shown is not None
    assert (shown.done, shown.place) == (5, 5)
    more.close()


def test_a_vote_file_elsewhere_names_pictures_of_a_folder_and_needs_no_prompts(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "votes").mkdir()
    votes = tmp_path / "votes" / "mine.jsonl"
    vote_all(open_session(str(folder), LabelSettings(questions=3, votes=str(votes))))
    examples = read_examples(str(votes), "data.pairs", PAIRS)
    assert len(examples) == 3
    assert all(picture() for e in examples for picture in e.pictures)  # pyright: ignore


def test_a_second_page_of_one_vote_file_is_refused(folder):
    session = open_session(str(folder), LabelSettings(questions=2))
    with FileLock(f"{session.file.path}.lock"), pytest.raises(UserError, match="Another page"):
        serve(session, "anna", port=0, opens=False)
    session.close()
