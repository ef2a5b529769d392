"""A layer's submodules: their weights if they are as they were built, else maps that call them.

Nothing is cached: the layer's options say how the submodules were built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast import arguments
from egnn_fast.nn._parts import FUSED_ACTIVATIONS
from egnn_fast.options import Options
from egnn_fast.reference import Map, Maps
from egnn_fast.weights import LayerWeights

# names of this module cost less than attributes of torch.nn
Linear, Sequential, Sigmoid, Tanh = nn.Linear, nn.Sequential, nn.Sigmoid, nn.Tanh


class _LookCloser(LookupError):
    """A module may not be as it was built."""


def read(layer: Any) -> LayerWeights | None:
    """The weights of a layer that is as it was built; None if :func:`changes` must decide.

    Runs in every call, so it reads the modules' dictionaries: attribute access through
    ``nn.Module`` would take as long as the kernel of a small graph.
    """
    part, options = layer.__dict__["_modules"].get, layer.options
    gate, head, vel = part("att_mlp"), part("coord_mlp"), part("coord_mlp_vel")
    if (gate is None) is options.attention or (head is None) is (options.coord_agg is not None):
        return None
    w_g = b_g = w3 = b3 = w_x = v1 = c1 = v2 = c2 = None
    try:
        edge = _own(part("edge_mlp"), Sequential)["_modules"]
        node = _own(part("node_mlp"), Sequential)["_modules"]
        if len(edge) != 4 or len(node) != 3:
            return None
        edge1, act, edge2, edge_act = edge.values()
        node1, node_act, node2 = node.values()
        # one activation object is in all places, unless it was replaced
        if edge_act is not act or node_act is not act:
            return None
        its = _own(act, FUSED_ACTIVATIONS[options.activation])
        if options.activation == "leaky_relu" and its["negative_slope"] != options.negative_slope:
            return None
        e1, e2 = _own(edge1, Linear)["_parameters"], _own(edge2, Linear)["_parameters"]
        n1, n2 = _own(node1, Linear)["_parameters"], _own(node2, Linear)["_parameters"]
        w1, b1, w2, b2 = e1["weight"], e1["bias"], e2["weight"], e2["bias"]
        u1, d1, u2, d2 = n1["weight"], n1["bias"], n2["weight"], n2["bias"]
        if b1 is None or b2 is None or d1 is None or d2 is None:
            return None
        if gate is not None:
            members = _own(gate, Sequential)["_modules"]
            if len(members) != 2:
                return None
            linear, sigmoid = members.values()
            _own(sigmoid, Sigmoid)
            parameters = _own(linear, Linear)["_parameters"]
            w_g, b_g = parameters["weight"], parameters["bias"]
            if b_g is None:
                return None
        if head is not None:
            members = _own(head, Sequential)["_modules"]
            if len(members) != (4 if options.coord_tanh else 3):
                return None
            head1, head_act, head2, *tanh = members.values()
            if tanh:
                _own(tanh[0], Tanh)
            first, last = _own(head1, Linear)["_parameters"], _own(head2, Linear)["_parameters"]
            w3, b3, w_x = first["weight"], first["bias"], last["weight"]
            if head_act is not act or b3 is None or last["bias"] is not None:
                return None
        if vel is not None:
            members = _own(vel, Sequential)["_modules"]
            if len(members) != 3:
                return None
            vel1, vel_act, vel2 = members.values()
            first, last = _own(vel1, Linear)["_parameters"], _own(vel2, Linear)["_parameters"]
            v1, c1, v2, c2 = first["weight"], first["bias"], last["weight"], last["bias"]
            if vel_act is not act or c1 is None or c2 is None:
                return None
    except LookupError:
        return None
    return LayerWeights(w1, b1, w2, b2, u1, d1, u2, d2, w_g, b_g, w3, b3, w_x, v1, c1, v2, c2)


def _own(module: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """The dictionary of a module of this very class that runs its class's forward alone."""
    if type(module) is kind:
        its: dict[str, Any] = module.__dict__
        if not (
            its["_forward_hooks"]
            or its["_forward_pre_hooks"]
            or its["_backward_hooks"]
            or its["_backward_pre_hooks"]
            or "forward" in its
            or "_compiled_call_impl" in its
        ):
            return its
    raise _LookCloser


def changes(layer: Any) -> Iterator[tuple[str, bool]]:
    """Which submodules are not as they were built, and how, each with whether it is an activation.

    A Linear that PyTorch reparametrised is left out: its weights still say what it computes.

    Raises
    ------
    ValueError
        A submodule that the options ask for is missing, or there is one that they have no use for.
    """
    options = layer.options
    act = FUSED_ACTIVATIONS[options.activation]
    small, head = (Linear, act, Linear), options.coord_agg is not None
    tanh = (Tanh,) if options.coord_tanh else ()
    built: dict[str, tuple[type[nn.Module], ...] | None] = {
        "edge_mlp": (*small, act),
        "node_mlp": small,
        "att_mlp": (Linear, Sigmoid) if options.attention else None,
        "coord_mlp": (*small, *tanh) if head else None,
        "coord_mlp_vel": small,
    }
    for name, kinds in built.items():
        part = getattr(layer, name, None)
        if part is None and kinds is not None and name != "coord_mlp_vel":
            raise ValueError(f"{name}: the layer's options ask for it, but it was removed")
        if part is not None and kinds is None:
            raise ValueError(f"{name}: the layer has one, but its options have no use for it")
        if part is None or kinds is None:
            continue
        found = _touched(part)
        if type(part) is not Sequential or found:
            yield f"{name} {found or _is_a(part, Sequential)}", False
            continue
        members = list(part._modules.items())
        for k, kind in enumerate(kinds):
            if k == len(members):
                yield f"{name}.{k}, a {kind.__name__}, was removed", False
                break
            place, module = f"{name}.{members[k][0]}", members[k][1]
            biased = name != "coord_mlp" or k == 0
            found = _touched(module) or _differs(module, kind, options, biased)
            if found:
                yield f"{place} {found}", kind is act
        if len(members) > len(kinds):
            place, module = members[len(kinds)]
            yield f"{name}.{place}, a {type(module).__name__}, was added", False


def first_change(layer: Any) -> str | None:
    """The first of :func:`changes`; None if the layer is as it was built."""
    for change, _ in changes(layer):
        return change
    return None


def _touched(module: Any) -> str | None:
    """What runs beside a module's own forward or in its place; None if nothing does."""
    if not isinstance(module, nn.Module):
        return None
    try:
        _own(module, type(module))
    except LookupError:
        pass
    else:
        return None
    for hooks, name in (
        (module._forward_hooks, "a forward hook"),
        (module._backward_hooks, "a backward hook"),
        (module._backward_pre_hooks, "a backward pre-hook"),
    ):
        if hooks:
            return f"has {name}"
    if not all(map(_reparametrises, module._forward_pre_hooks.values())):
        return "has a forward pre-hook"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return "is compiled by itself" if "_compiled_call_impl" in module.__dict__ else None


def _differs(module: Any, kind: type[nn.Module], options: Options, biased: bool) -> str | None:
    """How a module differs from the one that was built; None if it does not."""
    found = type(module)
    if kind is Linear and issubclass(found, Linear):
        # torch.nn.utils.parametrize makes a class of its own, with the same forward
        if found.forward is not Linear.forward or found.__call__ is not Linear.__call__:
            return _is_a(module, kind)
        if (module.bias is not None) is not biased:
            return "has a bias" if module.bias is not None else "has no bias"
        return None
    if found is not kind:
        return _is_a(module, kind)
    if kind is nn.LeakyReLU and module.negative_slope != options.negative_slope:
        return f"has negative_slope={module.negative_slope}, not {options.negative_slope}"
    return None


def _is_a(module: Any, kind: type[nn.Module]) -> str:
    found = type(module)
    # other classes of the same name: peft's and quantised Linears
    same = found.__name__ in ("Linear", kind.__name__)
    name = f"{found.__module__}.{found.__name__}" if same else found.__name__
    known = FUSED_ACTIVATIONS.values()
    if kind in known and type(module) not in known:
        return f"is a {name}: only SiLU, ReLU and LeakyReLU run fused"
    return f"is a {name}, not the {kind.__name__} that the layer was built with"


def reparametrised(layer: Any) -> LayerWeights:
    """The weights of a layer whose Linears, reparametrised or not, are where they were built."""
    parts = layer._modules
    head, gate, vel = map(parts.get, ("coord_mlp", "att_mlp", "coord_mlp_vel"))
    found = [*_pair(parts["edge_mlp"], 0), *_pair(parts["edge_mlp"], 2)]
    found += [*_pair(parts["node_mlp"], 0), *_pair(parts["node_mlp"], 2)]
    found += (None, None) if gate is None else _pair(gate, 0)
    found += (None, None, None) if head is None else (*_pair(head, 0), _pair(head, 2)[0])
    if vel is not None:
        found += (*_pair(vel, 0), *_pair(vel, 2))
    return LayerWeights(*found)  # type: ignore[arg-type]


def _pair(sequence: Any, place: int) -> tuple[Tensor, Tensor | None]:
    """A Linear's weight and bias, after the hooks that set them."""
    linear = list(sequence._modules.values())[place]
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())
    return linear.weight, linear.bias


def _reparametrises(hook: Callable[..., Any]) -> bool:
    """Whether a hook is PyTorch's own, of weight_norm, spectral_norm or pruning."""
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def maps_of(layer: Any) -> Maps:
    """A layer's modules, as they are, for :mod:`egnn_fast.reference`."""

    def part(name: str, width: int | None) -> Map | None:
        module = getattr(layer, name, None)
        return None if module is None else _checked(name, module, width)

    edge, node = part("edge_mlp", None), part("node_mlp", layer.out_features)
    assert edge is not None and node is not None
    return Maps(edge, node, *(part(k, 1) for k in ("att_mlp", "coord_mlp", "coord_mlp_vel")))


def _checked(name: str, module: Map, width: int | None) -> Map:
    """The module, with a ValueError for an output that is not ``[rows, width]``."""

    def run(z: Tensor) -> Tensor:
        out = module(z)
        if (
            not isinstance(out, Tensor)
            or out.dim() != 2
            or out.shape[0] != z.shape[0]
            or width not in (None, out.shape[1])
        ):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            shape = f"[{z.shape[0]}, {width or 'any'}]"
            raise ValueError(f"{name}: expected to give shape {shape}, got {got}")
        return out

    return run


def check_dtype(layer: nn.Module, h: Tensor) -> None:
    """Raise TypeError unless some parameter of the layer has the dtype of ``h``."""
    arguments.check_float("h", h, 2)
    dtypes = {p.dtype for p in layer.parameters() if p.is_floating_point()}
    if dtypes and h.dtype not in dtypes and not torch.is_autocast_enabled(h.device.type):
        wanted = " or ".join(sorted(map(str, dtypes)))
        raise TypeError(f"h: expected dtype {wanted} as the layer has, got {h.dtype}")
