"""Between a torch model and the shared vector: weights in, weights out, and their difference.

A parameter that stands at several places of a network (tied weights) is one tensor, under the first of its names.
Integer buffers belong to the machine they are on. Buffers of floating point would drift apart unaveraged: refused.
"""

import numpy as np
import torch
from torch import nn

from dugnad.optim.layout import Layout, LayoutError, Vector


def load_weights(model: nn.Module, layout: Layout, vector: Vector) -> None:
    """Set the parameters of `model`, on whichever device, to `vector`, float32 (total_elements,), which is copied.

    Raises LayoutError if the vector or the parameters do not fit the layout; the model then stays as it is.
    """
    tensors = layout.unflatten(vector)
    parameters = _parameters(model, layout)
    with torch.no_grad():
        for name, parameter in parameters.items():
            # copied: the shared vector is read-only, which torch has no notion of
            parameter.copy_(torch.from_numpy(tensors[name].copy()))


def weights_of(model: nn.Module, layout: Layout) -> Vector:
    """Return the parameters of `model` as a new vector, float32 (total_elements,), padding zero. Raises LayoutError."""
    parameters = _parameters(model, layout)
    return layout.flatten({name: parameter.detach().cpu().numpy() for name, parameter in parameters.items()})


def pseudo_gradient(theta: Vector, model: nn.Module, layout: Layout) -> Vector:
    """Return theta - theta_i, float32 (total_elements,), new: how far `model` has gone from `theta`, negated.

    Like a gradient it points uphill, hence the sign. After DiLoCo (arXiv:2311.08105). Raises LayoutError.
    """
    layout.check_vector(theta)
    weights = weights_of(model, layout)
    return np.subtract(theta, weights, out=weights)


def _parameters(model: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    """Each parameter once, by the name that the layout knows it by. Raises LayoutError."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() or buffer.is_complex():
            kind = str(buffer.dtype).removeprefix("torch.")
            raise LayoutError(
                f"buffer {name!r} is {kind}: it would drift apart between peers. Make it a parameter or do without it"
            )
    parameters = dict(model.named_parameters())
    shapes = dict(layout.tensors)
    if parameters.keys() != shapes.keys():
        missing, foreign = sorted(shapes.keys() - parameters.keys()), sorted(parameters.keys() - shapes.keys())
        raise LayoutError(f"model does not fit the layout: missing {missing[:5]}, not in it {foreign[:5]}")
    for name, parameter in parameters.items():
        # checked here: copy_ would stretch a smaller tensor to the size, and round to a coarser dtype, in silence
        if parameter.dtype != torch.float32 or tuple(parameter.shape) != shapes[name]:
            found = f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}"
            raise LayoutError(f"parameter {name!r} is {found}, the layout has float32 {shapes[name]}")
    return parameters
