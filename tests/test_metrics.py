"""Recall at k, on matrices small enough to rank by eye."""

import pytest
import torch

from clip.tasks.metrics import recall_at_k

EYE = torch.eye(3, dtype=torch.bool)


def test_ranks_read_by_eye():
    similarities = torch.tensor(
        [
            [0.9, 0.1, 0.2],  # right answer first
            [0.8, 0.5, 0.1],  # second
            [0.3, 0.2, 0.1],  # third
        ]
    )
    assert recall_at_k(similarities, EYE, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1})


def test_the_best_of_several_right_answers_counts():
    similarities = torch.tensor([[0.1, 0.5, 0.9, 0.7]])
    right = torch.tensor([[True, False, False, True]])
    assert recall_at_k(similarities, right, (1, 2)) == {1: 0, 2: 1}


def test_right_answers_do_not_push_each_other_down():
    similarities = torch.tensor([[0.9, 0.8, 0.7]])
    assert recall_at_k(similarities, torch.tensor([[True, True, False]]), (1,)) == {1: 1}


def test_a_model_that_gives_everything_one_place_scores_nothing():
    assert recall_at_k(torch.zeros(3, 3), EYE, (1, 2)) == {1: 0, 2: 0}


def test_not_a_number_is_no_hit():
    assert recall_at_k(torch.full((3, 3), torch.nan), EYE, (1,)) == {1: 0}


def test_a_cut_beyond_all_candidates_finds_everything():
    assert recall_at_k(torch.rand(3, 3), EYE, (10,)) == {10: 1}


def test_order_of_candidates_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    similarities, right = torch.rand(6, 9, generator=generator), torch.rand(6, 9, generator=generator) < 0.3
    right[:, 0] = True
    order = torch.randperm(9, generator=generator)
    assert recall_at_k(similarities[:, order], right[:, order]) == recall_at_k(similarities, right)


def test_a_query_without_answer_and_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one right answer"):
        recall_at_k(torch.rand(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        recall_at_k(torch.rand(2, 3), torch.ones(3, 2, dtype=torch.bool))
