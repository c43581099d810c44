"""Whether predicting makes steps faster, measured: steps with it against steps without, in turn.

What one prefetch saves can only be estimated, since the reads of a step hold each other up; what a
step takes is a fact. But steps take longer the more bytes they lack, whatever is predicted, and by
far more than predicting changes. So steps are compared at the same number of bytes: the slope of
time over bytes is fitted within both ways of running, and what is left of a step's time once it is
subtracted is compared by medians, which a disturbed step does not move.

What is left still scatters by more than predicting changes, where steps differ much. So the trial
goes on until the difference is clear of its own error, up to a limit. Meanwhile the way that looks
better gets three steps of four: where it is better, trying longer costs little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

BLOCK_STEPS = 2
"""Steps in a row that are run the same way: what a step leaves behind hits its own way too."""
WARM_STEPS = 32
"""Steps that predict and are not compared, at first: slots fill."""
COMPARED_STEPS = 64
"""Steps that are compared at least, half of them with predictions."""
MAX_COMPARED_STEPS = 320
"""Steps that are compared at most."""
CLEAR = 2.0
"""Standard errors that the difference has to be from `WORTH`, before that."""
WORTH = 0.01
"""Share of a step's time that predicting has to save."""
FIRST_HOLD_STEPS = 512
"""Steps that a decision holds at first; each time in a row that it is the same doubles it."""
MAX_HOLD_STEPS = 8192
BETWEEN_LOOKS = 32
"""Steps between two looks at the difference."""
_EVEN = (False, True, True, False)
"""Which blocks predict, in turn: a drift hits both ways alike."""
_LEANING = (True, True, True, False, False, True, True, True)
"""Which blocks run the way that leads, after the first look: a drift hits both alike here, too."""
_MAD_TO_SIGMA = 1.4826  # of normal noise
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean


class StepTrial:
    """Says for each step whether it may predict, and takes in how long it took.

    Attributes:
        predicts: the decision that holds, or held last; True before there is one.
        is_trying: whether steps are being compared.
    """

    def __init__(self) -> None:
        """Begin with a trial."""
        self.predicts = True
        self.is_trying = True
        self._hold_steps = 0  # until there is a decision
        self._begun = 0
        self._warm = WARM_STEPS
        # Of steps without and with predictions: bytes that they lacked, and milliseconds.
        self._steps: tuple[list[tuple[int, float]], ...] = ([], [])
        self._compare_at = COMPARED_STEPS
        self._leads: bool | None = None  # the way that looked better; None before the first look
        self._way = True

    def begin(self) -> bool:
        """Whether the step that begins may predict."""
        if self.is_trying:
            self._way = self._begun < self._warm or self._tried_way()
        else:
            self._way = self.predicts
            if self._begun >= self._hold_steps:
                self._restart()
                return self.begin()
        self._begun += 1
        return self._way

    def end(self, ms: float, lacked_bytes: int) -> None:
        """Take in the step that began last.

        Args:
            ms: how long it took.
            lacked_bytes: what it needed and had to be read, on demand or ahead.
        """
        if not self.is_trying or self._begun <= self._warm:
            return
        self._steps[self._way].append((lacked_bytes, ms))
        compared = sum(map(len, self._steps))
        if compared >= self._compare_at and all(self._steps):
            self._compare_at = compared + BETWEEN_LOOKS
            self._decide(compared >= MAX_COMPARED_STEPS)

    def _tried_way(self) -> bool:
        block = (self._begun - self._warm) // BLOCK_STEPS
        if self._leads is None:
            return _EVEN[block % len(_EVEN)]
        return self._leads == _LEANING[block % len(_LEANING)]

    def _decide(self, is_last: bool) -> None:
        """Decide if the difference is clear, or if there is no more time."""
        without, predicting = self._steps
        slope = _slope(without, predicting)
        worth_ms = WORTH * median(ms for _, ms in without)
        rest_ms, error_ms = _rest_ms(without, slope)
        predicting_ms, other_error_ms = _rest_ms(predicting, slope)
        gain_ms = rest_ms - predicting_ms - worth_ms
        decision = gain_ms > 0.0
        if not is_last and abs(gain_ms) < CLEAR * math.hypot(error_ms, other_error_ms):
            self._leads = decision
            return
        same = self._hold_steps > 0 and decision == self.predicts
        self._hold_steps = min(MAX_HOLD_STEPS, 2 * self._hold_steps) if same else FIRST_HOLD_STEPS
        self.predicts = decision
        self.is_trying = False
        self._begun = 0

    def _restart(self) -> None:
        self.is_trying = True
        self._begun = self._warm = 0
        self._steps = ([], [])
        self._compare_at = COMPARED_STEPS
        self._leads = None


def _slope(*groups: Sequence[tuple[int, float]]) -> float:
    """Milliseconds per byte: the median slope of all pairs within a group (Theil and Sen)."""
    slopes = [
        (ms - other_ms) / (lacked - other)
        for group in groups
        for (lacked, ms), (other, other_ms) in itertools.combinations(group, 2)
        if lacked != other
    ]
    return median(slopes) if slopes else 0.0


def _rest_ms(steps: Sequence[tuple[int, float]], slope: float) -> tuple[float, float]:
    """Median of what steps took beyond reading what they lacked, and its standard error."""
    rest_ms = [ms - slope * lacked for lacked, ms in steps]
    middle_ms = median(rest_ms)
    scatter_ms = _MAD_TO_SIGMA * median(abs(ms - middle_ms) for ms in rest_ms)
    return middle_ms, _MEDIAN_ERROR * scatter_ms / math.sqrt(len(steps))
