"""Which tokens of a batch count: the rule, what is taken and put, and what follows each."""

import pytest
import torch

from sae_lens_e2e.splice import NO_LABEL, Positions, Where, excluded

TOKENS = torch.tensor([[5, 1, 7, 2], [1, 5, 3, 9], [4, 4, 4, 4]])
SOME = Where(torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]]))


@pytest.mark.parametrize(
    ("seqpos_slice", "excluded_tokens", "expected"),
    [
        ((None,), (), [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ((1, -1), (), [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]),
        ((None, None, 2), (), [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]]),
        ((2,), (), [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]),
        ((None,), (1, 5), [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
        ((1, -1), (4, 7), [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
    ],
)
def test_a_token_counts_inside_the_slice_and_if_it_is_not_excluded(
    seqpos_slice: tuple[int | None, ...], excluded_tokens: tuple[int, ...], expected: list[list[int]]
) -> None:
    where = Positions(seqpos_slice, excluded_tokens).of(TOKENS)
    assert where.mask.int().tolist() == expected
    assert where.n == sum(map(sum, expected))
    assert where.is_all == (where.n == 12)


@pytest.mark.parametrize("where", [SOME, Where.everywhere(TOKENS)], ids=["some", "all"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_what_is_taken_and_put_back_is_in_its_place(where: Where, shape: tuple[int, ...]) -> None:
    values = torch.randn(3, 4, *shape, dtype=torch.float64, requires_grad=True)
    taken = where.take(values)
    assert torch.equal(taken, values[where.mask])
    assert torch.equal(where.put(values, taken), values)
    new = torch.randn_like(taken, requires_grad=True)
    put = where.put(values, new)
    assert torch.equal(put[where.mask], new)
    assert torch.equal(put[~where.mask], values[~where.mask])
    if where.is_all:
        return
    weight = torch.randn_like(put)
    by_values, by_new = torch.autograd.grad((weight * put).sum(), (values, new))
    assert torch.equal(by_new, weight[where.mask])
    assert torch.equal(by_values[~where.mask], weight[~where.mask])
    assert not by_values[where.mask].any()


def test_nothing_at_all_can_be_taken_and_put() -> None:
    nowhere = Where(torch.zeros(3, 4, dtype=torch.bool))
    values = torch.randn(3, 4, 2)
    assert (nowhere.n, nowhere.n_labels, nowhere.is_all) == (0, 0, False)
    assert nowhere.take(values).shape == (0, 2)
    assert torch.equal(nowhere.put(values, torch.empty(0, 2)), values)


def test_a_label_is_the_token_that_follows_and_the_last_has_none() -> None:
    everywhere = Where.everywhere(TOKENS)
    assert everywhere.labels(TOKENS).tolist() == [1, 7, 2, NO_LABEL, 5, 3, 9, NO_LABEL, 4, 4, 4, NO_LABEL]
    assert everywhere.n_labels == 9
    assert SOME.labels(TOKENS).tolist() == [1, 2, NO_LABEL, 4]
    assert SOME.n_labels == 3
    assert SOME.place().tolist() == [[0, 0], [0, 2], [0, 3], [2, 1]]
    assert SOME.take(TOKENS).tolist() == [5, 7, 2, 4]


def test_micro_batches_are_those_of_the_prompts() -> None:
    parts = SOME.split(2)
    assert [part.mask.shape for part in parts] == [(2, 4), (1, 4)]
    assert [(part.n, part.n_labels) for part in parts] == [(3, 2), (1, 1)]
    found = torch.cat([part.labels(tokens) for part, tokens in zip(parts, TOKENS.split(2), strict=True)])
    assert torch.equal(found, SOME.labels(TOKENS))


@pytest.mark.parametrize(("seqpos_slice", "fits"), [((None,), True), ((-2, None), True), ((-1, None), False), ((5, 5), False)])  # fmt: skip
def test_a_slice_without_a_position_that_predicts_is_refused(seqpos_slice: tuple[int | None, ...], fits: bool) -> None:
    positions = Positions(seqpos_slice)
    if fits:
        positions.check(8)
        return
    with pytest.raises(ValueError, match="has no position with a next token to predict"):
        positions.check(8)


def test_excluded_tokens_however_they_are_given() -> None:
    assert excluded(None) == ()
    assert excluded([7, 1]) == excluded(torch.tensor([7, 1])) == (1, 7)
