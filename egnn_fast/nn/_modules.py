"""Read a layer's submodules: their weights if they are unmodified, else functions that call them.

A submodule is unmodified if it is still what ``EGCLBase.__init__`` built for the layer's options
and runs nothing else (hooks, another ``forward``). Nothing is cached: every call compares the
submodules with the options again.
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

# looking up a global is faster than an attribute of torch.nn
Linear, Sequential, Sigmoid, Tanh = nn.Linear, nn.Sequential, nn.Sigmoid, nn.Tanh


class _MaybeModified(LookupError):
    """A module is not obviously unmodified."""


def read(layer: Any) -> LayerWeights | None:
    """The weights of an unmodified layer; None if it may be modified (ask :func:`changes`).

    This runs in every call, so it reads the modules' dictionaries: attribute access through
    ``nn.Module`` would take as long as the kernel of a small graph.
    """
    part, options = layer.__dict__["_modules"].get, layer.options
    gate, head, vel = part("att_mlp"), part("coord_mlp"), part("coord_mlp_vel")
    if (gate is None) is options.attention or (head is None) is (options.coord_agg is not None):
        return None
    w_g = b_g = w3 = b3 = w_x = v1 = c1 = v2 = c2 = None
    try:
        edge = _dict_of(part("edge_mlp"), Sequential)["_modules"]
        node = _dict_of(part("node_mlp"), Sequential)["_modules"]
        if len(edge) != 4 or len(node) != 3:
            return None
        edge1, act, edge2, edge_act = edge.values()
        node1, node_act, node2 = node.values()
        # all MLPs share one activation object, unless it was replaced
        if edge_act is not act or node_act is not act:
            return None
        attributes = _dict_of(act, FUSED_ACTIVATIONS[options.activation])
        is_leaky = options.activation == "leaky_relu"
        if is_leaky and attributes["negative_slope"] != options.negative_slope:
            return None
        e1, e2 = _dict_of(edge1, Linear)["_parameters"], _dict_of(edge2, Linear)["_parameters"]
        n1, n2 = _dict_of(node1, Linear)["_parameters"], _dict_of(node2, Linear)["_parameters"]
        w1, b1, w2, b2 = e1["weight"], e1["bias"], e2["weight"], e2["bias"]
        u1, d1, u2, d2 = n1["weight"], n1["bias"], n2["weight"], n2["bias"]
        if b1 is None or b2 is None or d1 is None or d2 is None:
            return None
        if gate is not None:
            members = _dict_of(gate, Sequential)["_modules"]
            if len(members) != 2:
                return None
            linear, sigmoid = members.values()
            _dict_of(sigmoid, Sigmoid)
            parameters = _dict_of(linear, Linear)["_parameters"]
            w_g, b_g = parameters["weight"], parameters["bias"]
            if b_g is None:
                return None
        if head is not None:
            members = _dict_of(head, Sequential)["_modules"]
            if len(members) != (4 if options.coord_tanh else 3):
                return None
            head1, head_act, head2, *tanh = members.values()
            if tanh:
                _dict_of(tanh[0], Tanh)
            first = _dict_of(head1, Linear)["_parameters"]
            last = _dict_of(head2, Linear)["_parameters"]
            w3, b3, w_x = first["weight"], first["bias"], last["weight"]
            if head_act is not act or b3 is None or last["bias"] is not None:
                return None
        if vel is not None:
            members = _dict_of(vel, Sequential)["_modules"]
            if len(members) != 3:
                return None
            vel1, vel_act, vel2 = members.values()
            first = _dict_of(vel1, Linear)["_parameters"]
            last = _dict_of(vel2, Linear)["_parameters"]
            v1, c1, v2, c2 = first["weight"], first["bias"], last["weight"], last["bias"]
            if vel_act is not act or c1 is None or c2 is None:
                return None
    except LookupError:
        return None
    return LayerWeights(w1, b1, w2, b2, u1, d1, u2, d2, w_g, b_g, w3, b3, w_x, v1, c1, v2, c2)


def _dict_of(module: Any, cls: type[nn.Module]) -> dict[str, Any]:
    """The ``__dict__`` of a module of exactly the class ``cls`` that runs nothing but its forward.

    Raises
    ------
    _MaybeModified
        The class is another one, or the module has hooks or another ``forward``, or is compiled.
    """
    if type(module) is cls:
        attributes: dict[str, Any] = module.__dict__
        if not (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
            or "_compiled_call_impl" in attributes
        ):
            return attributes
    raise _MaybeModified


def changes(layer: Any) -> Iterator[tuple[str, bool]]:
    """Each modified submodule and how it was modified, and whether it is an activation.

    Linears that PyTorch reparametrised do not count: their weights still say what they compute.

    Raises
    ------
    ValueError
        A submodule that the options need was removed, or one that they do not use was added.
    """
    options = layer.options
    act = FUSED_ACTIVATIONS[options.activation]
    mlp, has_head = (Linear, act, Linear), options.coord_agg is not None
    tanh = (Tanh,) if options.coord_tanh else ()
    # the classes of each MLP's members as they were built; None if the options do not use the MLP
    built: dict[str, tuple[type[nn.Module], ...] | None] = {
        "edge_mlp": (*mlp, act),
        "node_mlp": mlp,
        "att_mlp": (Linear, Sigmoid) if options.attention else None,
        "coord_mlp": (*mlp, *tanh) if has_head else None,
        "coord_mlp_vel": mlp,
    }
    for name, classes in built.items():
        part = getattr(layer, name, None)
        if part is None and classes is not None and name != "coord_mlp_vel":
            raise ValueError(f"{name}: the layer's options ask for it, but it was removed")
        if part is not None and classes is None:
            raise ValueError(f"{name}: the layer has one, but its options have no use for it")
        if part is None or classes is None:
            continue
        change = _interception(part)
        if type(part) is not Sequential or change:
            yield f"{name} {change or _other_class(part, Sequential)}", False
            continue
        members = list(part._modules.items())
        for k, cls in enumerate(classes):
            if k == len(members):
                yield f"{name}.{k}, a {cls.__name__}, was removed", False
                break
            key, module = members[k]
            biased = name != "coord_mlp" or k == 0
            change = _interception(module) or _difference(module, cls, options, biased)
            if change:
                yield f"{name}.{key} {change}", cls is act
        if len(members) > len(classes):
            key, module = members[len(classes)]
            yield f"{name}.{key}, a {type(module).__name__}, was added", False


def first_change(layer: Any) -> str | None:
    """The first of :func:`changes` in words; None if the layer is unmodified or reparametrised."""
    for change, _ in changes(layer):
        return change
    return None


def _interception(module: Any) -> str | None:
    """What a call runs besides or instead of the class's forward, in words; None for nothing."""
    if not isinstance(module, nn.Module):
        return None
    try:
        _dict_of(module, type(module))
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


def _difference(module: Any, cls: type[nn.Module], options: Options, biased: bool) -> str | None:
    """How a module differs from the ``cls`` that was built, in words; None if it does not."""
    actual = type(module)
    if cls is Linear and issubclass(actual, Linear):
        # torch.nn.utils.parametrize replaces the class by a subclass with the same forward
        if actual.forward is not Linear.forward or actual.__call__ is not Linear.__call__:
            return _other_class(module, cls)
        if (module.bias is not None) is not biased:
            return "has a bias" if module.bias is not None else "has no bias"
        return None
    if actual is not cls:
        return _other_class(module, cls)
    if cls is nn.LeakyReLU and module.negative_slope != options.negative_slope:
        return f"has negative_slope={module.negative_slope}, not {options.negative_slope}"
    return None


def _other_class(module: Any, cls: type[nn.Module]) -> str:
    """In words: the module's class is not ``cls``."""
    actual = type(module)
    # peft's adapters and quantised Linears are called Linear too, so give their module
    ambiguous = actual.__name__ in ("Linear", cls.__name__)
    name = f"{actual.__module__}.{actual.__name__}" if ambiguous else actual.__name__
    fused = FUSED_ACTIVATIONS.values()
    if cls in fused and actual not in fused:
        return f"is a {name}: only SiLU, ReLU and LeakyReLU run fused"
    return f"is a {name}, not the {cls.__name__} that the layer was built with"


def reparametrised(layer: Any) -> LayerWeights:
    """The weights of a layer without :func:`changes`; its Linears may be reparametrised."""
    parts = layer._modules
    head, gate, vel = map(parts.get, ("coord_mlp", "att_mlp", "coord_mlp_vel"))
    weights = [*_pair(parts["edge_mlp"], 0), *_pair(parts["edge_mlp"], 2)]
    weights += [*_pair(parts["node_mlp"], 0), *_pair(parts["node_mlp"], 2)]
    weights += (None, None) if gate is None else _pair(gate, 0)
    weights += (None, None, None) if head is None else (*_pair(head, 0), _pair(head, 2)[0])
    if vel is not None:
        weights += (*_pair(vel, 0), *_pair(vel, 2))
    return LayerWeights(*weights)  # type: ignore[arg-type]


def _pair(sequence: Any, index: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the Linear at ``index``, after running the pre-hooks that compute them."""
    linear = list(sequence._modules.values())[index]
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())
    return linear.weight, linear.bias


def _reparametrises(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of PyTorch's: of weight_norm, spectral_norm or pruning."""
    return any(cls.__module__.startswith("torch.nn.utils.") for cls in type(hook).__mro__)


def maps_of(layer: Any) -> Maps:
    """Functions that call a layer's submodules, for :mod:`egnn_fast.reference`.

    They raise ValueError if a submodule returns a wrong shape.
    """

    def part(name: str, width: int | None) -> Map | None:
        module = getattr(layer, name, None)
        return None if module is None else _with_shape_check(name, module, width)

    edge, node = part("edge_mlp", None), part("node_mlp", layer.out_features)
    assert edge is not None and node is not None
    return Maps(edge, node, *(part(k, 1) for k in ("att_mlp", "coord_mlp", "coord_mlp_vel")))


def _with_shape_check(name: str, module: Map, width: int | None) -> Map:
    """The module with a check that it maps ``[K, any]`` to ``[K, width]``; None: any width."""

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
