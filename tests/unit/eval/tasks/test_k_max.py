import pytest

from longctx.eval.quiz import Quiz
from longctx.eval.tasks.k_max import effective_window, k_max
from tests.helpers.fakes import characters, copier


@pytest.mark.parametrize("sees", [336, 592])
def test_k_max_of_a_model_that_sees_the_last_m_tokens_is_m(sees):
    """Acceptance 2, with distances 64 apart: the largest tested one within m."""
    result, samples = effective_window(
        Quiz(copier(sees), characters, None, 2, 0, "teacher_forced", 4096), 1024, 16, 0.2
    )
    assert result["k_max"] == sees // 64 * 64
    assert [c["k"] for c in result["cells"]] == [64 * i for i in range(1, 17)]
    assert all(900 < s["tokens"] <= 1024 for s in samples)


@pytest.mark.parametrize(
    ("rates", "window"),
    [
        ([1, 1, 1, 1], 400),
        ([1, 0.2, 0.2, 0.19], 300),
        ([1, 0.1, 1, 1], 100),  # one dip ends it: PI's 7B-32k printed 18,432 once
        ([0.1, 1, 1, 1], 0),
    ],
)
def test_k_max_rule(rates, window):
    assert k_max([100, 200, 300, 400], rates, 0.2) == window
    assert k_max([400, 300, 200, 100], rates[::-1], 0.2) == window


def test_k_max_dip_of_the_paper():
    distances = [32768 * i // 32 for i in range(1, 33)]
    assert k_max(distances, [1.0] * 32, 0.2) == 32768
    dip = [1.0] * 18 + [0.1] + [1.0] * 13
    assert k_max(distances, dip, 0.2) == 18432
