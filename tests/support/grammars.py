"""JSON schemas that llguidance gives up: they have more ways to go on than it follows at a time, or take it hours."""

from __future__ import annotations

MANY_WAYS = {
    "anyOf": [
        {
            "type": "object",
            "properties": {f"k{i}_{j}": {"type": "string", "pattern": "[a-z]{1,500}"} for j in range(60)},
        }
        for i in range(20)
    ]
}
# The first tokens are sound.
LATER = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": MANY_WAYS},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# Whether a text can have all of these patterns takes as many states as there are sets of places: 2^29.
ENDLESS = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(1, 30)]}
