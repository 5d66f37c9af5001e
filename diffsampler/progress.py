"""A progress bar on request, silence otherwise."""

from __future__ import annotations

from types import TracebackType
from typing import Any, final

__all__ = ["Progress"]


@final
class Progress:
    """One bar that says what is being done.

    Arguments:
        enabled: Whether anything is shown.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def start(self, phase: str, total: int | None) -> None:
        """Begin a phase of ``total`` steps, or of unknown length.

        Raises:
            ImportError: If a bar is asked for and tqdm is not installed.
        """
        self._close()
        if self._enabled:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("Expected tqdm to be installed: pip install tqdm, or progress=False.") from error
            self._bar = tqdm(total=total, desc=phase, leave=False)

    def tell(self, phase: str) -> None:
        """Say what is being done now."""
        if self._bar is not None:
            self._bar.set_description(phase)
            self._bar.update(1)

    def training(self, entry: dict[str, float]) -> None:
        """Show a training history entry."""
        if self._bar is not None:
            shown = {key: f"{entry[key]:.3g}" for key in ("loss", "elbo", "ess") if key in entry}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(int(entry["step"]) - self._bar.n)
