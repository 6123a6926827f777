"""Progress of long loops: a tqdm bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Counts steps of a long loop, with rate, time left and named values such as the loss."""

    def __init__(self, total: int, what: str, *, start: int = 0, every_seconds: float = 10.0) -> None:
        self.total, self.what, self.done = total, what, start
        self.every = every_seconds
        self._first, self._began = start, time.monotonic()
        self._last = self._began
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=what, file=sys.stderr) if terminal else None

    def update(self, steps: int = 1, **values: float) -> None:
        """Count `steps` more and show `values`."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
            if values:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            return
        now = time.monotonic()
        if now - self._last >= self.every or self.done >= self.total:
            self._last = now
            rate = (self.done - self._first) / max(now - self._began, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            shown = " ".join(f"{k}={v:.4g}" for k, v in values.items())
            logger.info("%s %d/%d %.1f/s %.0f s left %s", self.what, self.done, self.total, rate, left, shown)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
