"""What every ``sidp`` command shares: errors as one line, and how to see more of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .errors import SidpError

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """One line on stderr and exit code 1 instead of a traceback; 128 + signal when a signal stopped it."""
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(130) from None
    except SidpError as error:
        if debug:
            raise
        _say(f"error: {error}")
        signum = getattr(error, "signum", None)
        raise typer.Exit(1 if signum is None else 128 + signum) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        _say(f"error: internal: {type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(1) from None


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)
