"""Taking over a module of a host model under its own names, and handing it back."""

from __future__ import annotations

from torch import nn

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def adopt(module: nn.Module, host: nn.Module, *, children: bool = True) -> None:
    """Gives ``module`` the parameters, buffers, children and hooks of ``host``, by reference.

    They keep their names and their order, so that state dicts and optimizer states fit. The hooks
    are the same dictionaries: one that is added or removed later counts for both.
    """
    object.__setattr__(module, "_host", (host,))  # in a tuple: a reference that is no child
    for name, parameter in host._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in host._buffers.items():
        module.register_buffer(name, buffer, name not in host._non_persistent_buffers_set)
    if children:
        for name, child in host._modules.items():
            module.add_module(name, child)
    for hooks in (*HOOKS, "_is_full_backward_hook"):
        if hasattr(host, hooks):
            object.__setattr__(module, hooks, getattr(host, hooks))
    module.training = host.training


def hand_back(module: nn.Module) -> nn.Module:
    """The host that ``module`` took over, with what has become of its parameters and children."""
    host: nn.Module = module._host[0]  # type: ignore[union-attr,index,assignment]
    for name in host._parameters:
        host._parameters[name] = module._parameters[name]
    for name in host._buffers:
        host._buffers[name] = module._buffers[name]
    for name in host._modules:
        if name in module._modules:
            host._modules[name] = module._modules[name]
    host.training = module.training
    return host
