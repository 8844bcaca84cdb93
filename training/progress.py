"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any

BAR = "{task.description} {task.completed:,.0f}/{task.total:,.0f}"


class Progress:
    """Args:
    steps: of the run.
    done: steps that were done before.
    every: steps from line to line where there is no terminal.
    quiet: say nothing, for another process does.
    """

    def __init__(self, steps: int, done: int, every: int, *, quiet: bool = False) -> None:
        self.steps, self.first, self.every, self.quiet = steps, done, every, quiet
        self.seconds = 0.0
        self.bar: Any = _bar() if sys.stdout.isatty() and not quiet else None

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("step", total=self.steps, completed=self.first, facts="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(
        self, step: int, seconds: float, *, loss: float, tokens_per_second: float, bits_per_byte: float | None = None,
        **beside: float,
    ) -> None:  # fmt: skip
        """Show a step that took so long. loss: the objective's; nats/token where there are bits. beside: by name."""
        self.seconds += seconds
        bits = "" if bits_per_byte is None else f"{bits_per_byte:.3f} bits/byte  "
        more = "".join(f"{name} {value:.4f}  " for name, value in beside.items())
        facts = f"loss {loss:.4f}  {bits}{more}{tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, facts=facts)
        elif not self.quiet and (step % self.every == 0 or step == self.steps):
            left = self.seconds / (step - self.first) * (self.steps - step)
            print(f"step {step:,}/{self.steps:,}  {facts}  {_clock(left)} left", flush=True)

    def say(self, message: str) -> None:
        """A line that stays, above the bar."""
        if self.bar is not None:
            self.bar.console.print(message, markup=False, highlight=False)
        elif not self.quiet:
            print(message, flush=True)


def _bar() -> Any:
    from rich import progress

    columns = (
        progress.TextColumn(BAR),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[facts]}"),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, refresh_per_second=2)  # drawing takes time from the processor that trains


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
