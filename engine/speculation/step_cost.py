"""What one more row costs a step, from the times of the steps there were."""

_MEMORY = 0.99  # what a step counts for, after each further one: about the last 100 are heard
_FIRST, _LONGEST = 8, 4.0  # after so many steps, none counts for more times what was expected: it waited, or compiled
_PRIOR_COST = 0.05  # of one more row, in times of a step, that is assumed
_PRIOR_SPREAD = 1.0  # as strongly as steps would say it whose rows have this variance


class StepCost:
    """Fits seconds = fixed + rows * per_row to the steps of one replica; recent ones count most.

    Feed it steps that only decode, and none that had to compile something.
    """

    def __init__(self) -> None:
        self._count = 0
        self._rows, self._seconds = 0.0, 0.0  # means
        self._variance, self._covariance = 0.0, 0.0  # of rows; of rows and seconds

    def observe(self, num_rows: int, seconds: float) -> None:
        assert num_rows > 0 and seconds > 0
        if self._count >= _FIRST:
            seconds = min(seconds, _LONGEST * self.seconds(num_rows))
        self._count += 1
        part = max(1 / self._count, 1 - _MEMORY)
        rows, seconds = num_rows - self._rows, seconds - self._seconds
        self._variance = (1 - part) * (self._variance + part * rows * rows)
        self._covariance = (1 - part) * (self._covariance + part * rows * seconds)
        self._rows += part * rows
        self._seconds += part * seconds

    def marginal(self, num_rows: int) -> float:
        """Time of one more row, in times of a step of `num_rows`; in [0, 1 / num_rows]."""
        if not self._count:
            return min(_PRIOR_COST, 1 / num_rows)
        prior = _PRIOR_COST * self._seconds
        per_row = (self._covariance + _PRIOR_SPREAD * prior) / (self._variance + _PRIOR_SPREAD)
        per_row = min(max(per_row, 0.0), self._seconds / self._rows)  # what is fixed costs at least nothing
        return per_row / (self._seconds + (num_rows - self._rows) * per_row)

    def seconds(self, num_rows: int) -> float:
        """Of a step of so many rows; 0 where there was none yet."""
        if not self._count:
            return 0.0
        per_row = self.marginal(num_rows)
        return self._seconds / (1 + (self._rows - num_rows) * per_row)
