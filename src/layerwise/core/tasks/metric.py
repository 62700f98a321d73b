"""The metric by which runs of a task are compared: its name, its direction, and how it is written."""

from typing import NamedTuple

WORDS = {"rmse": "RMSE", "f1": "F1", "miou": "mIoU", "bits_per_byte": "bits per byte"}


class Metric(NamedTuple):
    """A metric of a task.

    >>> Metric("accuracy").title, Metric("rmse", larger=False, share=False).title
    ('accuracy, %', 'RMSE')
    """

    name: str
    larger: bool = True
    """Whether a larger value is better."""
    share: bool = True
    """Whether it is a share, written in percent."""

    @property
    def words(self) -> str:
        """The name as people write it."""
        return WORDS.get(self.name, self.name)

    @property
    def title(self) -> str:
        """Name and unit, as above a column."""
        return f"{self.words}, %" if self.share else self.words

    @property
    def factor(self) -> float:
        """What a value is multiplied by before it is written."""
        return 100.0 if self.share else 1.0

    @property
    def digits(self) -> int:
        """Digits after the point."""
        return 2 if self.share else 3

    def written(self, value: float) -> str:
        """A value with its unit.

        >>> Metric("accuracy").written(0.97), Metric("rmse", share=False).written(55.3124)
        ('97.00 %', '55.312')
        """
        return f"{self.factor * value:.{self.digits}f}" + (" %" if self.share else "")

    def better_first(self, value: float) -> float:
        """A number by which values are sorted, the best one first."""
        return -value if self.larger else value


ACCURACY = Metric("accuracy")
