"""How an option of a run is declared, checked and read from text, for ``config`` and the objectives alike."""

import math
import types
from dataclasses import field, fields
from fractions import Fraction
from typing import Any, get_args


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and names the option or path to mend."""


def option(
    default: Any,
    help: str = "",
    *,
    name: str | None = None,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with limits, of which ``None`` is free.

    Args:
        help: what ``gradnorm train --help`` says of it; without it, an objective's field is no option.
        name: of the run's option, where an objective's field is called otherwise.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "name": name, "limits": limits})


def check_options(owner: Any, error: type[Exception] = ValueError) -> None:
    """Raises ``error``, naming the field, if a value of the dataclass ``owner`` is outside its limits."""
    for item in fields(owner):
        value, limits = getattr(owner, item.name), item.metadata.get("limits")
        if value is None or limits is None:
            continue
        wanted = {
            f"one of {', '.join(limits['choices'] or ())}": limits["choices"]
            and value not in limits["choices"],
            "a finite number": isinstance(value, float) and not math.isfinite(value),
            f"at least {limits['minimum']}": limits["minimum"] is not None and value < limits["minimum"],
            f"at most {limits['maximum']}": limits["maximum"] is not None and value > limits["maximum"],
            f"more than {limits['above']}": limits["above"] is not None and value <= limits["above"],
            f"less than {limits['below']}": limits["below"] is not None and value >= limits["below"],
        }
        for what, missed in wanted.items():
            if missed:
                raise error(f"{item.name}: expected {what}, got {value}")


def as_type(key: str, value: Any, hint: Any) -> Any:
    """The option ``key`` in the type that it wants, from a text or what YAML makes of one.

    Raises:
        TrainingError: if it has no such value.
    """
    optional = isinstance(hint, types.UnionType)
    kind = get_args(hint)[0] if optional else hint
    # YAML reads no as false.
    if optional and (value is None or value is False or value in ("none", "null")):
        return None
    text = str(value)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is str:
            if isinstance(value, bool):  # what YAML makes of on and off
                return "on" if value else "off"
            if not isinstance(value, str):
                raise ValueError
            return value
        number = Fraction(text) if "/" in text else kind(text)
        if number != number or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (KeyError, ValueError, ZeroDivisionError):
        expected = {bool: "true or false", int: "a whole number", str: "a text"}
        wanted = expected.get(kind, "a number or a fraction such as 4/255")
        raise TrainingError(f"{key}: expected {wanted}, got {value!r}") from None
