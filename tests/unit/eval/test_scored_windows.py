import numpy as np
import pytest
import torch

from longctx.errors import UserError
from longctx.eval.scored_windows import Window, evenly, mean_over, score_windows
from tests.helpers.fakes import Fake, Memory, by_position, position_nll


@pytest.mark.parametrize(
    ("count", "wanted", "indices"),
    [(3, None, [0, 1, 2]), (3, 5, [0, 1, 2]), (10, 1, [0]), (11, 3, [0, 5, 10]), (4, 3, [0, 1, 3])],
)
def test_evenly(count, wanted, indices):
    assert evenly(count, wanted) == indices


def test_windows_are_batched_by_shape_and_size():
    store = Memory([[0] * 100, [0] * 50])
    plan = [Window(0, 0, 10, 1), Window(0, 5, 15, 6), Window(1, 0, 10, 1)]
    plan += [Window(0, 0, 10, 4), Window(0, 0, 60, 1)]
    model = by_position()
    nlls = score_windows(model, store, plan, 25, "test")
    assert model.shapes == [(2, 10), (1, 10), (1, 10), (1, 60)]
    assert [len(n) for n in nlls] == [9, 9, 9, 6, 59]
    np.testing.assert_allclose(nlls[3], position_nll(np.arange(4, 10)), rtol=1e-6)


def test_a_loss_that_is_not_finite_is_told():
    model = Fake(lambda tokens: torch.full((*tokens.shape, 2), torch.nan))
    with pytest.raises(UserError, match="not finite in document 0 at token 3"):
        score_windows(model, Memory([[0] * 9]), [Window(0, 3, 9, 4)], 25, "test")


def test_mean_is_over_tokens_and_its_error_over_documents():
    rng = np.random.default_rng(0)
    windows = [Window(d, 0, 9, 1) for d in (0, 0, 1, 2)]
    nlls = [rng.random(n) for n in (3, 5, 2, 7)]
    mean = mean_over(windows, nlls)
    assert mean.nll == pytest.approx(np.concatenate(nlls).mean())
    assert (mean.tokens, mean.clusters) == (17, 3)
    groups = [np.concatenate(nlls[:2]), nlls[2], nlls[3]]
    residuals = np.array([g.sum() - mean.nll * len(g) for g in groups])
    assert mean.se == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / 17)
    assert mean.row()["perplexity_se"] == pytest.approx(np.exp(mean.nll) * mean.se)


def test_error_of_equal_clusters_is_the_usual_one():
    rng = np.random.default_rng(1)
    nlls = [rng.random(4) for _ in range(6)]
    mean = mean_over([Window(d, 0, 5, 1) for d in range(6)], nlls)
    usual = np.std([n.mean() for n in nlls], ddof=1) / np.sqrt(6)
    assert mean.se == pytest.approx(usual)


def test_one_document_has_its_windows_as_clusters_and_one_window_no_error():
    nlls = [np.array([1.0, 2.0]), np.array([3.0])]
    mean = mean_over([Window(4, 0, 3, 1), Window(4, 3, 5, 4)], nlls)
    assert mean.clusters == 2 and mean.se is not None
    assert mean_over([Window(4, 0, 3, 1)], nlls[:1]).se is None
