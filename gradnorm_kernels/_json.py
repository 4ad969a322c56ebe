"""How measurements are written: JSON that is read, and whose changes are read, by the line."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["by_line"]


def by_line(contents: Mapping[str, Any]) -> str:
    """JSON text of ``contents``, with a line for each element of each value: for each row, each fact."""
    entries = ",\n".join(f" {json.dumps(key)}: {_spread(value)}" for key, value in contents.items())
    return f"{{\n{entries}\n}}\n"


def _spread(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        entries = (f"  {json.dumps(key)}: {json.dumps(element)}" for key, element in value.items())
        return "{\n" + ",\n".join(entries) + "\n }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(element)}" for element in value) + "\n ]"
    return json.dumps(value)
