"""Figures of merit, on matrices small enough to rank by eye, and beside scikit-learn's on larger ones."""

import numpy as np
import pytest
import sklearn.metrics
import torch

from clip.tasks import metrics
from clip.tasks.metrics import (
    confusion_matrix,
    mean_per_class_accuracy,
    mean_reciprocal_rank_at_k,
    ranks,
    recall_at_k,
    top_k_accuracy,
)

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
    nothing = torch.full((3, 3), torch.nan)
    assert recall_at_k(nothing, EYE, (1, 2, 3, 100)) == dict.fromkeys((1, 2, 3, 100), 0)
    assert mean_reciprocal_rank_at_k(nothing, EYE, (1, 100)) == {1: 0, 100: 0}


def test_not_a_number_stands_before_the_right_answer():
    assert ranks(torch.tensor([[torch.nan, 0.9, 0.1]]), torch.tensor([[False, True, False]])).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_are_ranked_as_the_floats_they_are(dtype):
    generator = torch.Generator().manual_seed(3)
    similarities = torch.randint(5, (20, 6), generator=generator).to(dtype)
    right = torch.arange(6) == torch.randint(6, (20, 1), generator=generator)
    assert torch.equal(ranks(similarities, right), ranks(similarities.float(), right))


def test_the_smallest_integers_are_told_apart():
    similarities = torch.tensor([[torch.iinfo(torch.int64).min, 0]] * 2)
    assert ranks(similarities, torch.eye(2, dtype=torch.bool)).tolist() == [2, 1]


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


def test_ranks_and_their_reciprocals_read_by_eye():
    similarities = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # right answers in the first and third column: rank 1
            [0.1, 0.9, 0.3, 0.8],  # rank 3
            [0.5, 0.6, 0.5, 0.7],  # rank 3
            [0.1, 0.2, 0.1, 0.1],  # as near as a wrong one: rank 3
        ]
    )
    right = torch.tensor([[True, False, True, False]] * 4)
    assert ranks(similarities, right).tolist() == [1, 3, 3, 3]
    expected = {1: 1 / 4, 2: 1 / 4, 3: (1 + 3 * 1 / 3) / 4}
    assert mean_reciprocal_rank_at_k(similarities, right, (1, 2, 3)) == pytest.approx(expected)


def test_both_directions_of_several_captions_a_picture():
    similarities = torch.tensor(  # two pictures, three captions, the first two of which belong to the first picture
        [
            [0.9, 0.1, 0.5],
            [0.2, 0.3, 0.4],
        ]
    )
    right = torch.tensor([[True, True, False], [False, False, True]])
    assert recall_at_k(similarities, right, (1,)) == {1: 1}
    assert ranks(similarities.T, right.T).tolist() == [1, 2, 2]


def test_one_right_answer_makes_the_mean_reciprocal_rank_an_average_precision():
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(7, 11, generator=generator)
    targets = torch.randint(11, (7,), generator=generator)
    right = torch.arange(11) == targets[:, None]
    expected = sklearn.metrics.label_ranking_average_precision_score(right.numpy(), similarities.numpy())
    assert mean_reciprocal_rank_at_k(similarities, right, (11,))[11] == pytest.approx(expected)


def test_ranks_do_not_depend_on_how_many_are_looked_at_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    similarities, right = torch.rand(13, 5, generator=generator), torch.rand(13, 5, generator=generator) < 0.5
    right[:, 3] = True
    whole = ranks(similarities, right)
    monkeypatch.setattr(metrics, "CELLS", 11)  # two rows
    assert torch.equal(ranks(similarities, right), whole)


# Classification

SCORES = torch.tensor(
    [
        [0.7, 0.2, 0.1],  # right
        [0.6, 0.3, 0.1],  # right
        [0.2, 0.7, 0.1],  # taken for 1
        [0.5, 0.4, 0.1],  # taken for 0, right in the second place
    ]
)
TARGETS = torch.tensor([0, 0, 0, 1])


def test_accuracies_and_confusions_counted_by_hand():
    assert top_k_accuracy(SCORES, TARGETS, (1, 2)) == {1: 0.5, 2: 1}
    assert mean_per_class_accuracy(SCORES, TARGETS) == pytest.approx((2 / 3 + 0) / 2)  # class 2 has no picture
    assert confusion_matrix(SCORES, TARGETS).tolist() == [[2, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_classification_agrees_with_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(60, 7, generator=generator)
    targets = torch.cat([torch.arange(7), torch.randint(7, (53,), generator=generator)])
    truth, taken = targets.numpy(), scores.argmax(dim=1).numpy()
    for k, share in top_k_accuracy(scores, targets, (1, 3, 6)).items():
        assert share == pytest.approx(sklearn.metrics.top_k_accuracy_score(truth, scores.numpy(), k=k))
    expected = sklearn.metrics.balanced_accuracy_score(truth, taken)
    assert mean_per_class_accuracy(scores, targets) == pytest.approx(expected)
    assert np.array_equal(confusion_matrix(scores, targets), sklearn.metrics.confusion_matrix(truth, taken))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_all_the_same_win_nothing(value):
    scores, targets = torch.full((4, 3), value), torch.tensor([0, 1, 2, 0])
    assert top_k_accuracy(scores, targets, (1, 2)) == {1: 0, 2: 0}
    assert mean_per_class_accuracy(scores, targets) == 0
    assert confusion_matrix(scores, targets).trace() == 0


def test_every_picture_is_counted_once_in_the_confusions_and_the_right_ones_on_the_diagonal():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(4, (200, 5), generator=generator).float()  # many ties
    scores[torch.rand(200, 5, generator=generator) < 0.1] = torch.nan
    targets = torch.randint(5, (200,), generator=generator)
    matrix = confusion_matrix(scores, targets)
    assert torch.equal(matrix.sum(dim=1), targets.bincount(minlength=5))
    assert matrix.trace() / 200 == pytest.approx(top_k_accuracy(scores, targets, (1,))[1])


def test_integers_and_doubles_are_confused_only_where_they_are_equal():
    scores = torch.tensor([[0, 2**24, 2**24 + 1]])  # the same in float32
    for dtype in (torch.int64, torch.float64):
        assert confusion_matrix(scores.to(dtype), torch.tensor([0])).nonzero().tolist() == [[0, 2]]


def test_targets_that_do_not_fit_the_scores_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3,\)"):
        top_k_accuracy(SCORES, TARGETS[:3])
    with pytest.raises(ValueError, match="from 0 to 2, got 0 to 3"):
        confusion_matrix(SCORES, torch.tensor([0, 1, 2, 3]))
