"""Base of all suites; refuses subclasses that lose tests silently."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

import pytest

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
_REASON = "__overrides_because__"
_HOME = "lmcache_kit.testing."


def overrides(reason: str) -> Callable[[_F], _F]:
    """Replace a test of a suite for a reason; a subclass that replaces one without is refused.

    >>> @overrides("our offers are public by design")
    ... def test_an_offer_cannot_be_guessed(self): ...
    """
    if not isinstance(reason, str) or not reason.strip():
        raise TypeError('overrides needs a reason: @overrides("why this test does not apply")')

    def mark(function: _F) -> _F:
        setattr(function, _REASON, reason)
        return function

    return mark


class Suite:
    """Base of the suites.

    pytest collects a subclass outside of the kit whatever its name is, unless the subclass sets
    ``__test__ = False``.
    """

    __test__ = False

    timeout_s: ClassVar[float] = 10.0
    """Limit of every wait, in seconds. A correct plugin never uses it up."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if cls.__module__.startswith(_HOME):
            return
        cls.__test__ = vars(cls).get("__test__", True)
        if "__init__" in vars(cls):
            raise TypeError(f"{cls.__name__}.__init__: pytest ignores classes that have one")
        for name, value in list(vars(cls).items()):
            if problem := _problem(cls, name, value):
                raise TypeError(f"{cls.__qualname__}.{name} {problem}")

    def missing(self, what: str, example: str) -> NoReturn:
        """Fail because the author has not defined a fixture or an attribute."""
        name, suite = type(self).__name__, _suite_of(type(self)).__name__
        shown = textwrap.indent(textwrap.dedent(example).strip(), "        ")
        pytest.fail(
            f"{name} does not define {what}, which {suite} needs. It belongs into the class:\n\n"
            f"    class {name}({suite}):\n{shown}\n",
            pytrace=False,
        )

    def within(self, call: Callable[[], _T], *, what: str, seconds: float | None = None) -> _T:
        """Return or raise what ``call`` does; fail if it takes too long.

        A call that takes too long goes on in a daemon thread.
        """
        results: list[_T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True, name=f"conformance: {what}")
        thread.start()
        limit_s = self.timeout_s if seconds is None else seconds
        thread.join(limit_s)
        if raised:
            raise raised[0]
        if not results:
            pytest.fail(f"{what} has not ended after {limit_s:g} s")
        return results[0]


def check_items(items: Iterable[pytest.Item]) -> None:
    """Raise pytest.UsageError for tests of suites that were replaced or marked after the class."""
    for item in items:
        cls = getattr(item, "cls", None)
        if not (isinstance(cls, type) and issubclass(cls, Suite)):
            continue
        name = getattr(item, "originalname", item.name)
        problem = _problem(cls, name, vars(cls)[name]) if name in vars(cls) else ""
        for mark in item.iter_markers():
            if mark.name in ("skip", "skipif", "xfail") and not _reason_of(mark):
                problem = f"is marked {mark.name} without a reason: say reason=..."
        if problem:
            raise pytest.UsageError(f"{cls.__qualname__}.{name} {problem}")


def _problem(cls: type, name: str, value: object) -> str:
    """Return what is wrong with an attribute of an author's class; empty if nothing is."""
    own = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
    reason = getattr(value, _REASON, "")
    if name.startswith("test") and own is not None and not reason:
        return (
            f"replaces a test of {_suite_of(cls).__name__} without a reason: "
            f'@overrides("why") from lmcache_kit.testing gives one'
        )
    if reason and own is None:
        known = ", ".join(sorted(each for each in dir(cls) if each.startswith("test_")))
        return f"overrides nothing. Known: {known}"
    if _is_fixture(own) and not _is_fixture(value):
        return "must be a fixture: put @pytest.fixture above it"
    return ""


def _is_fixture(value: object) -> bool:
    return isinstance(value, type(_example_fixture))


def _suite_of(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith(_HOME))


def _reason_of(mark: pytest.Mark) -> str:
    positional = mark.args[:1] if mark.name == "skip" else ()
    return str(mark.kwargs.get("reason") or "".join(map(str, positional)))


@pytest.fixture
def _example_fixture() -> None:
    """Shows the type of fixtures in this version of pytest."""
