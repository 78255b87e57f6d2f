"""The lines on the terminal, the verdict, and the Markdown report, which is written anew after every check."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from mmubn.analysis.gpu_check.outcome import FAILED, OK, SKIPPED, Bar, Outcome

__all__ = ['Report']

TITLE = '# Check of the GPU kernels of mmubn'


class Report:
    """What has been found so far.

    Args:
        folder: Where ``report.md`` is written; it is made.
        facts: What the results depend on, by name.
        on_gpu: Whether a GPU is checked, not Triton's interpreter.
    """

    def __init__(self, folder: Path, facts: dict[str, str], on_gpu: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / 'report.md'
        self.facts = facts
        self.on_gpu = on_gpu
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.write('The check has only begun.')

    def add(self, outcome: Outcome) -> None:
        """Print it and write it down. May be called by several threads."""
        with self._lock:
            self.outcomes.append(outcome)
            print(outcome, flush=True)
            self.write('The check was not finished when this was written.')

    def finish(self) -> bool:
        """Write and print the verdict. Returns whether nothing failed and something was checked."""
        verdict = f'{self.verdict()} It took {time.monotonic() - self._start:.0f} s.'
        self.write(verdict)
        for each in ('', *self.of(FAILED), *self.bars(), verdict):
            print(each)
        print(f'The report is {self.path}; attach it to a bug report.', flush=True)
        return bool(self.of(OK)) and not self.of(FAILED)

    def of(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    def bars(self) -> list[Bar]:
        return [bar for outcome in self.outcomes for bar in outcome.bars]

    def verdict(self) -> str:
        """What the check came to, in plain words."""
        ok, failed, skipped = (len(self.of(status)) for status in (OK, FAILED, SKIPPED))
        where = '' if self.on_gpu else " This was Triton's interpreter on the CPU, which says nothing of a GPU's speed."
        if failed:
            return f'WRONG: {failed} of {ok + failed} checks failed, {skipped} were skipped.{where}'
        if not ok:
            return f'NOT CHECKED: none of {skipped} checks could be made.{where}'
        words = f'RIGHT: all {ok} checks that were made are ok, {skipped} were skipped.{where}'
        if not self.on_gpu:
            return words
        bars = self.bars()
        if not bars:
            return f'{words} Speed was not measured.'
        missed = [bar for bar in bars if not bar.met]
        if not missed:
            return f'{words} FAST: all {len(bars)} bars are met.'
        return f'{words} SLOWER THAN WANTED: {len(missed)} of {len(bars)} bars are not met.'

    def write(self, verdict: str) -> None:
        """Write the report with these words on top."""
        lines = [TITLE, '', f'**{verdict}**', '', *(f'- {name}: {value}' for name, value in self.facts.items()), '']
        if failed := self.of(FAILED):
            lines += ['## Failed', '', *(f'- {o.stage}: {o.name}: {o.note}' for o in failed), '']
        if bars := self.bars():
            lines += ['## Bars', '', *(f'- {bar}' for bar in bars), '']
        for stage, count in Counter(outcome.stage for outcome in self.outcomes).items():
            lines += [f'## {stage.capitalize()}: {count} checks', '', '| | check | note | s |', '|---|---|---|---:|']
            found = [outcome for outcome in self.outcomes if outcome.stage == stage]
            for each in found:
                cells = [each.status, each.name, each.note, f'{each.seconds:.1f}']
                lines.append(f'| {" | ".join(_cell(text) for text in cells)} |')
            lines += ['', *(line for each in found if each.table for line in (each.table, ''))]
        draft = self.path.with_suffix('.tmp')  # a run that is killed leaves a whole report
        draft.write_text('\n'.join(lines), encoding='utf-8')
        draft.replace(self.path)


def _cell(text: str) -> str:
    """The text in one cell of a table."""
    return ' '.join(text.split()).replace('|', '\\|')
