"""A check, what it finds, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

__all__ = ['FAILED', 'OK', 'SKIPPED', 'Bar', 'Check', 'Finding', 'Outcome', 'Skip']

OK, FAILED, SKIPPED = 'ok', 'FAIL', 'skipped'


class Skip(Exception):  # noqa: N818 - it is no error
    """A check cannot be made here; its text is the reason."""


class Bar(NamedTuple):
    """A measured value beside what it should not exceed. One that is not met is no failure."""

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f'{self.what}: {self.value:.3g}, bar {self.limit:g}, {"met" if self.met else "not met"}'


class Finding(NamedTuple):
    """What a check has to say besides that nothing is wrong."""

    note: str = ''
    bars: tuple[Bar, ...] = ()
    table: str = ''  # Markdown


class Check(NamedTuple):
    """One thing to see. ``run`` raises where it is wrong, :class:`Skip` where it cannot be seen here."""

    name: str
    run: Callable[[], Finding | str | None]


@dataclass
class Outcome:
    """What came of a check; a worker process hands it on as a dictionary."""

    stage: str
    name: str
    status: str  # OK, FAILED or SKIPPED
    note: str = ''
    seconds: float = 0.0
    bars: list[Bar] = field(default_factory=list)
    table: str = ''

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> Outcome:
        return cls(**values | {'bars': [Bar(*bar) for bar in values['bars']]})

    def __str__(self) -> str:
        words = [f'{self.status:7}', f'[{self.stage}]', self.name, *([f'- {self.note}'] if self.note else [])]
        return '\n'.join([f'{" ".join(words)} ({self.seconds:.1f} s)', *(f'        {bar}' for bar in self.bars)])
