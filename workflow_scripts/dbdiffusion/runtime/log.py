"""Logging of a stage: everything it prints, warns or raises goes to its log file and to the console."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbdiffusion.runtime.errors import UserError

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def stage_log(path: str | Path) -> Iterator[logging.Logger]:
    """Send log records and warnings of the block to `path` and stderr.

    A UserError ends the process with its message alone (exit status 1); any other exception is
    logged with its traceback and raised again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    level = root.level
    handlers: list[logging.Handler] = [logging.FileHandler(path, mode="w"), logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    # Third-party chatter that says nothing about the data.
    for noisy in ("numba", "matplotlib", "fontTools", "h5py", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logger = logging.getLogger("dbdiffusion")
    try:
        with _logged_warnings():
            yield logger
    except UserError as error:
        logger.error("%s", error)
        raise SystemExit(1) from None
    except BaseException:
        logger.error("failed\n%s", traceback.format_exc())
        raise
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextmanager
def _logged_warnings() -> Iterator[None]:
    """Warnings as log records, without those about other people's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
