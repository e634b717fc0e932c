"""Old names of training settings, which are still accepted with a warning until the next release."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

RENAMED = {"form": "rank_loss", "margin": "rank_margin", "temperature": "rank_temperature"}
"""Old names and new ones: `margin` and `temperature` are settings of the sampler, too."""


def new_name(name: str, given: Collection[str]) -> str:
    """The name that a setting has now; warns if `name` is an old one.

    Args:
        given: the names of all settings that are given together.

    Raises:
        ValueError: the setting is given under its old and its new name.
    """
    if name not in RENAMED:
        return name
    new = RENAMED[name]
    if new in given:
        raise ValueError(f"{name} is the old name of {new}, and both are given: leave {name} out")
    warnings.warn(
        f"{name} is now called {new}; the old name will be refused from the next release on",
        FutureWarning,
        stacklevel=2,
    )
    return new


def under_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with old names replaced; see `new_name`."""
    return {new_name(name, settings): value for name, value in settings.items()}


def options_under_new_names(argv: Sequence[str]) -> list[str]:
    """The same command line with old option names replaced; see `new_name`."""
    given = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        is_old = option.startswith("--") and option[2:] in RENAMED
        words.append(f"--{new_name(option[2:], given)}{equals}{value}" if is_old else word)
    return words


def accept_old_names(settings_class: type[T]) -> type[T]:
    """Lets the constructor of a dataclass take the old names as keywords."""
    own_init = settings_class.__init__

    @wraps(own_init)
    def init(self: T, *args: Any, **settings: Any) -> None:
        own_init(self, *args, **under_new_names(settings))

    settings_class.__init__ = init
    return settings_class
