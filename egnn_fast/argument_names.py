"""Names of the same argument in ``egnn_fast.nn`` and in the official code, for error messages.

A constructor that is called with another code's name of an argument raises a TypeError that gives
its own name.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# Each line has the names of one argument; the name in egnn_fast.nn comes first.
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
# The value in egnn_fast.nn that corresponds to True in the official code.
_VALUES = {
    "normalize": "coord_norm='unit'",
    "norm_diff": "coord_norm=1.0",
    "clamp": "coord_clamp=100.0",
}
# Never suggested: the official code ignores it.
_WITHOUT_EFFECT = "clamp"


def suggest_own_name(cls: Class) -> Class:
    """Decorate a class: its constructor's error for another code's argument name suggests its own.

    For other unknown names Python's own TypeError is raised.
    """
    original: Any = vars(cls)["__init__"]
    own_names = inspect.signature(original).parameters

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for used in kwargs:
            if used not in own_names:
                names: tuple[str, ...] = next((names for names in _NAMES if used in names), ())
                own = [name for name in names if name in own_names and name != _WITHOUT_EFFECT]
                if own:
                    in_nn = own[0] == names[0]
                    suggestion = _VALUES.get(used, own[0]) if in_nn else own[0]
                    raise TypeError(f"{used}: {type(self).__name__} calls it {suggestion}")
        original(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    return cls
