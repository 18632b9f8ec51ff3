"""A threshold chosen from the data."""

from __future__ import annotations

import pytest

from kit.core.errors import KitError
from kit.judging.calibration import share_threshold
from kit.judging.judge import Judge
from tests.judging_cases import LengthBackend, judge_config, whole_row


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_whole_traces_is_sufficient(share: float) -> None:
    rows = [whole_row("Word. " * n) for n in (10, 40, 20, 30)]
    judge = Judge(judge_config(share=share), LengthBackend())
    threshold = share_threshold(judge, rows) - 1e-9
    enough = [0.01 * len(judge.request(row, row.trace).ids) >= threshold for row in rows]
    assert sum(enough) == share * 4


@pytest.mark.parametrize("keys", [{"decode": "generate"}, {"limit_tokens": 64}])
def test_without_any_margin_no_threshold_can_be_chosen(keys: dict[str, object]) -> None:
    judge = Judge(judge_config(**keys), LengthBackend())
    with pytest.raises(KitError, match="cannot choose a threshold"):
        share_threshold(judge, [whole_row()])
