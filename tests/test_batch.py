"""Noise belongs to an image's keys and a purpose, whatever batch the image stands in."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from flowalign.batch import Cond, Keys, Prompts, Rollout, Rows

SHAPE = (2, 4, 4)


def cond(count: int) -> Cond:
    rows = torch.arange(count, dtype=torch.float32)
    return Cond(
        {"row": rows, "tokens": rows.view(-1, 1, 1)}, {"row": -rows, "tokens": -rows.view(-1, 1, 1)}
    )


def prompts(count: int = 6) -> Prompts:
    return Prompts(
        prompts=[f"prompt {i // 3}" for i in range(count)],
        metadata=[{"row": i} for i in range(count)],
        keys=Keys.training(0, 5, [divmod(i, 3) for i in range(count)]),
        cond=cond(count),
        weight=torch.ones(count),
    )


def of_keys(*rows: tuple[int, int, int, int]) -> Prompts:
    count = len(rows)
    return Prompts(
        prompts=[""] * count,
        metadata=[{}] * count,
        keys=Keys.of_rows(rows),
        cond=cond(count),
        weight=torch.ones(count),
    )


def rollout(count: int = 6) -> Rollout:
    batch, rows = prompts(count), torch.arange(count, dtype=torch.float32)
    path = rows.view(-1, 1, 1) + torch.zeros(count, 4, 1)
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    return Rollout(
        prompts=batch.prompts,
        metadata=batch.metadata,
        keys=batch.keys,
        cond=batch.cond,
        weight=(rows % 2 == 0).float(),
        x0=path[:, -1],
        path=path[:, 1:],
        log_prob=torch.zeros(count, 2),
        images=images,
        reward=rows,
        advantage=rows,
        steps=range(1, 3),
        terms={"term": rows},
    )


def test_a_piece_of_a_batch_draws_the_same_noise():
    batch = prompts()
    whole = batch.noise("loss", 0, SHAPE)
    assert torch.equal(
        torch.cat([piece.noise("loss", 0, SHAPE) for piece in batch.pieces(4)]), whole
    )
    assert torch.equal(batch[2:5].noise("loss", 0, SHAPE), whole[2:5])


def test_what_was_drawn_before_does_not_matter():
    noise = prompts().noise("loss", 0, SHAPE)
    torch.manual_seed(123)
    torch.randn(10)
    prompts().noise("rollout", 3, SHAPE)
    assert torch.equal(prompts().noise("loss", 0, SHAPE), noise)


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    prompts().noise("loss", 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("column", range(4))
def test_another_seed_step_prompt_or_image_gives_other_noise(column):
    other = [1, 2, 3, 4]
    other[column] += 1
    one, two = of_keys((1, 2, 3, 4)), of_keys(tuple(other))
    assert not torch.equal(one.noise("loss", 0, SHAPE), two.noise("loss", 0, SHAPE))
    assert not torch.equal(one.uniform("loss", 0), two.uniform("loss", 0))


def test_another_purpose_or_draw_gives_other_noise():
    batch = prompts()
    noises = [
        batch.noise(purpose, draw, SHAPE) for purpose in ("loss", "rollout") for draw in (0, 1)
    ]
    assert all(not torch.equal(noises[i], noises[j]) for i in range(4) for j in range(i))


def test_images_of_a_batch_get_different_noise():
    noise = prompts().noise("loss", 0, SHAPE).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise)


def test_noise_is_standard_normal_within_and_across_images():
    keys = [(0, 0, *divmod(row, 20)) for row in range(400)]
    noise = of_keys(*keys).noise("loss", 0, (64,))
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    torch.testing.assert_close(
        noise.flatten().quantile(levels), Normal(0.0, 1.0).icdf(levels), atol=0.05, rtol=0
    )
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert noise[:, 0].std() == pytest.approx(1, abs=0.12)
    between = torch.corrcoef(noise[:20]).fill_diagonal_(0)
    assert between.abs().max() < 0.6


def test_noise_is_float32_on_the_cpu():
    noise = prompts().noise("loss", 0, SHAPE)
    assert (noise.dtype, noise.device.type, noise.shape) == (torch.float32, "cpu", (6, *SHAPE))


def test_noise_that_a_group_shares_is_drawn_once(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(a) or randn(*a, **k))
    noise = prompts().noise("loss", 0, SHAPE, shared=True)
    groups = prompts().group.tolist()
    assert len(drawn) == len(set(groups)) < len(groups)
    for row, group in zip(noise, groups, strict=True):
        assert torch.equal(row, noise[groups.index(group)])
    assert not torch.equal(noise[0], noise[-1])


def test_a_slice_takes_every_field_of_its_images_and_keeps_those_of_the_batch():
    piece = rollout()[2:4]
    assert piece.prompts == ["prompt 0", "prompt 1"]
    assert piece.metadata == [{"row": 2}, {"row": 3}]
    assert piece.group.tolist() == [0, 1]
    for tensor in (
        piece.path[:, 0, 0],
        piece.reward,
        piece.advantage,
        piece.cond.inputs["row"],
        -piece.cond.null["row"],
        piece.cond.inputs["tokens"][:, 0, 0],
    ):
        assert tensor.tolist() == [2, 3]
    assert len(piece.images) == len(piece.log_prob) == len(piece.cond) == len(piece) == 2
    assert piece.steps == range(1, 3)


def test_pieces_cover_the_batch_in_order():
    pieces = rollout().pieces(4)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert torch.cat([piece.reward for piece in pieces]).tolist() == list(range(6))


def test_a_transition_is_found_by_the_number_of_its_step():
    batch = rollout()
    numbered = replace(
        batch,
        path=batch.path + torch.tensor([1, 2, 3]).view(1, 3, 1) / 10,
        log_prob=torch.tensor([[-1.0, -2.0]]).expand(6, 2),
    )
    before, after, log_prob = numbered[4:5].transition(2)
    assert (before.item(), after.item(), log_prob.item()) == pytest.approx((4.2, 4.3, -2))
    for other in (0, 3):
        with pytest.raises(IndexError, match=rf"Step {other} .* which are \[1, 2\]"):
            numbered.transition(other)
    nothing = numbered.without_path()
    with pytest.raises(IndexError, match="needs_stochastic_steps"):
        nothing.transition(1)
    assert (nothing.path.shape, nothing.log_prob.shape) == ((6, 0, 1), (6, 0))
    assert nothing.steps == range(0)
    assert torch.equal(nothing.x0, batch.x0)


def test_a_cond_keeps_its_guidance_when_sliced_and_loses_it_when_asked():
    guided = cond(4).guided(4.5)
    assert guided[1:3].guidance == 4.5
    assert len(guided[1:3]) == 2
    assert guided.unguided().guidance == 1
    assert guided.unguided().inputs is guided.inputs


def test_images_of_a_prompt_share_its_row_however_they_are_cut_and_joined():
    table, empty = {"x": torch.tensor([[1.0], [2.0]])}, {"x": torch.zeros(1, 1)}
    index = torch.tensor([0, 0, 1, 1])
    whole = Cond(Rows(table, index), Rows(empty, torch.zeros_like(index)))
    joined = Cond.concatenate([whole[:1], whole[1:3], whole[[3]]]).twice()
    for side, held in zip(joined.rows, (table, empty), strict=True):
        assert side.table is held
    assert joined.inputs["x"].flatten().tolist() == [1, 1, 2, 2] * 2
    assert joined.null["x"].flatten().tolist() == [0] * 8


def test_rows_of_several_tables_are_joined_with_a_table_of_both():
    parts = [Rows({"x": torch.tensor(values)}, torch.tensor([1, 0])) for values in ([1, 2], [3, 4])]
    joined = Rows.concatenate([parts[0], parts[1].take([0]), parts[0].take([1])])
    assert joined["x"].tolist() == [2, 1, 4, 1]


def test_a_condition_without_inputs_keeps_its_number_of_rows_and_no_memory():
    nothing = cond(3).without_inputs()
    assert len(nothing) == len(Cond.concatenate([nothing[:1], nothing[1:]])) == 3
    assert not any(rows.table["nothing"].nbytes for rows in nothing.rows)


def test_conditions_with_null_inputs_of_their_own_are_joined_row_by_row():
    parts = [cond(2), cond(3)]
    joined = Cond.concatenate(parts)
    assert joined.inputs["row"].tolist() == [0, 1, 0, 1, 2]
    assert joined.null["row"].tolist() == [0, -1, 0, -1, -2]
    assert len(joined.twice()) == 10
