"""Argument names in ``egnn_fast.nn`` and in the official code; errors give the right one."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# each line: the names of one argument, that of egnn_fast.nn first
_NAMES = (
    ("in_features", "input_nf", "in_node_nf"),
    ("out_features", "output_nf", "out_node_nf"),
    ("hidden_features", "hidden_nf"),
    ("edge_attr_dim", "edges_in_d", "in_edge_nf"),
    ("node_attr_dim", "nodes_att_dim", "nodes_attr_dim"),
    ("activation", "act_fn"),
    ("residual", "recurrent"),
    ("coord_norm", "normalize", "norm_diff"),
    ("coord_tanh", "tanh"),
    ("coord_agg", "coords_agg"),
    ("coord_scale", "coords_weight"),
    ("coord_clamp", "clamp"),
)
# official arguments that egnn_fast.nn takes with another value
_VALUES = {
    "normalize": "coord_norm='unit'",
    "norm_diff": "coord_norm=1.0",
    "clamp": "coord_clamp=100.0",
}
# has no effect in the official code: not suggested
_USELESS = "clamp"


def hinted(cls: Class) -> Class:
    """Let the constructor's error for an argument's other name give its own name of it.

    If it has none, Python's own error is raised.
    """
    build: Any = vars(cls)["__init__"]
    known = inspect.signature(build).parameters

    @functools.wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for given in kwargs:
            if given not in known:
                names: tuple[str, ...] = next((names for names in _NAMES if given in names), ())
                here = [name for name in names if name in known and name != _USELESS]
                if here:
                    own = _VALUES.get(given, here[0]) if here[0] == names[0] else here[0]
                    raise TypeError(f"{given}: {type(self).__name__} calls it {own}")
        build(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    return cls
