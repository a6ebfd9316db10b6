"""Damage to a JSON value that leaves it JSON."""

import random
from copy import deepcopy

VALUES = (None, True, "text", "two\nlines", "", [], [1], {}, {"a": 1}, 10**400, 0.5, -1)


def places(value, at: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*at, key), *places(inner, (*at, key)))]


def change(value, draw: random.Random, how: str):
    """`value`, with one value inside it of another type, one key removed, or one added."""
    *way, last = draw.choice(places(value))
    inside = value
    for key in way:
        inside = inside[key]
    if how == "type":
        inside[last] = deepcopy(draw.choice([new for new in VALUES if type(new) is not type(inside[last])]))
    elif how == "remove":
        del inside[last]
    elif isinstance(inside, dict):
        inside["added"] = deepcopy(draw.choice(VALUES))
    return value
