"""Which objectives there are. Each file of this package registers its own: a run can then ask for it by name,
and what its class declares by :func:`~..options.option` are options of a run.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from .common import Objective


@dataclass(frozen=True)
class Row:
    """A registered objective, as :func:`register` takes it."""

    kind: type[Any]
    help: str
    check: Callable[[Any], None]
    differentiates_twice: bool
    parts: Mapping[str, str]


OBJECTIVES: dict[str, Row] = {}


def register(
    name: str,
    kind: type[Any],
    help: str,
    *,
    check: Callable[[Any], None] = lambda config: None,
    differentiates_twice: bool = True,
    **parts: str,
) -> None:
    """Adds an objective to those that a run can have.

    Args:
        name: what the option ``objective`` calls it.
        kind: its class, a dataclass that makes an :class:`Objective`.
        help: what ``gradnorm train --help`` says of it.
        check: raises a TrainingError where a run's options do not go together.
        differentiates_twice: whether its loss holds a gradient of the model.
        parts: the class's arguments that are objectives, by the names under which these are registered.
    """
    OBJECTIVES[name] = Row(kind, help, check, differentiates_twice, parts)


def objective_options() -> list[tuple[str, Field[Any]]]:
    """All objectives' options by name, with the field of the class that each sets; some more than once."""
    return [pair for row in OBJECTIVES.values() for pair in _options(row.kind).items()]


def make_objective(config: Any, name: str | None = None) -> Objective:
    """The objective called ``name``, or the one that ``config`` names, with the settings of ``config``."""
    row = OBJECTIVES[name or config.objective]
    settings = {item.name: getattr(config, option) for option, item in _options(row.kind).items()}
    return row.kind(**settings, **{key: make_objective(config, part) for key, part in row.parts.items()})


def _options(kind: type[Any]) -> dict[str, Field[Any]]:
    return {item.metadata["name"] or item.name: item for item in fields(kind) if item.metadata.get("help")}
