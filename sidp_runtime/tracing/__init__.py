"""Traces of what ranks do, as JSON for ui.perfetto.dev or chrome://tracing. ``docs/trace.md`` says how to read them."""

from .chrome import Part, merge, part_of, write
from .session import NUM_EVENTS, Tracing

__all__ = ["NUM_EVENTS", "Part", "Tracing", "merge", "part_of", "write"]
