"""Replaces functions of torch for a moment, and only for the thread that plans.

A replaced function asks whether its thread is the one that plans. For all other threads it is the
original. Everything is put back whatever happens, even if a Ctrl-C comes at any line.
"""

import contextlib
import functools
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# Two threads must not replace functions at once. Each would put back the other's replacement.
LOCK = threading.RLock()

_ABSENT = object()


class Replacement:
    """Another value of one attribute of an object, or of one key of a module's namespace."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        space = owner if isinstance(owner, dict) else vars(owner)
        self.original = space.get(name, _ABSENT)

    def put(self) -> None:
        self._set(self.value)

    def put_back(self) -> None:
        self._set(self.original)

    def _set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            if value is _ABSENT:
                self.owner.pop(self.name, None)
            else:
                self.owner[self.name] = value
        elif value is not _ABSENT:
            setattr(self.owner, self.name, value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


def run_replaced(
    replacements: Callable[[], Sequence[Replacement]],
    body: Callable[[], T],
    put_back: Callable[[], None],
) -> T:
    """Run ``body`` with the replacements in place.

    They are made under the lock, so that none takes another thread's replacement for the original.
    This is not a context manager, and no ``with`` takes the lock. A Ctrl-C between ``__enter__``
    and the block, or before ``__exit__``, would leave the replacements in place or the lock held.
    If an interruption stops the first attempt to put things back, a second one follows.

    Args:
        put_back: puts back everything else in the end. It has to be safe to repeat.
    """
    try:
        return _run_under_the_lock(replacements, body, put_back)
    except KeyboardInterrupt:
        _release()  # it may have come before the line that releases
        raise


def _run_under_the_lock(
    replacements: Callable[[], Sequence[Replacement]],
    body: Callable[[], T],
    put_back: Callable[[], None],
) -> T:
    try:  # this comes before the lock is taken, so that no line between the two is unprotected
        LOCK.acquire()
        return _run(replacements, body, put_back)
    finally:
        _release()


def _release() -> None:
    with contextlib.suppress(RuntimeError):  # this thread may not have the lock
        LOCK.release()


def _run(
    replacements: Callable[[], Sequence[Replacement]],
    body: Callable[[], T],
    put_back: Callable[[], None],
) -> T:
    made: list[Replacement] = []

    def put_all_back() -> None:
        for replacement in reversed(made):
            replacement.put_back()
        put_back()

    try:
        try:
            made += replacements()
            for replacement in made:
                replacement.put()
            return body()
        except KeyboardInterrupt as error:
            _close_contexts(error)
            raise
        finally:
            put_all_back()
    finally:
        put_all_back()


def _close_contexts(error: BaseException | None) -> None:
    """Close the contexts that the frames of an interruption hold, before anything is put back.

    If the ``__exit__`` of a ``contextlib.contextmanager`` was interrupted, it ends only when its
    last frame is forgotten. By then everything has been put back, and the effect of its last lines
    (torch pushes a function mode) would stay.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def in_this_thread(original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is ``instead`` in the present thread, and ``original`` in all others."""
    thread = threading.get_ident()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = instead if threading.get_ident() == thread else original
        return chosen(*args, **kwargs)

    return call
