"""Rules of recurrent layers: dead inputs go, the hidden state stays whole."""
from __future__ import annotations

import numpy as np
from torch import fx

from .atoms import PINNED
from .builder import Builder, rule
from .capture import origin
from .rules_layers import arguments


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(b: Builder, node: fx.Node) -> object:
    """weight_ih_l0 (gates * hidden, in), and that of the reverse direction, read the units in the last dimension. A state
    that is given, and all that the layer makes, is kept whole."""
    x_node, state, parameters, bidirectional = arguments(
        node, "input", "hx", "params", "bidirectional"
    )
    path, module = b.owner(node)
    x, weights = b.value(x_node), [b.parameter(p) for p in parameters]
    if x is None or any(w is None for w in weights) or not hasattr(module, "input_size"):
        return NotImplemented
    last = len(x.shape) - 1
    x = b.uniform_except(x, last)
    # a direction has weight_ih, weight_hh, bias_ih and bias_hh, and weight_hr with a projection
    a_direction = len(weights) // (arguments(node, "num_layers")[0] * (2 if bidirectional else 1))
    reading = (0, a_direction) if bidirectional else (0,)
    for number, weight in enumerate(weights):
        for dim, size in enumerate(weight.shape):
            reads = number in reading and dim == 1
            b.align(weight, dim, x.axis(last) if reads else np.full(size, PINNED))
    b.flow.contract(x.slot)
    b.attribute(path, "input_size", x.axis(last))
    for one in [state] if isinstance(state, fx.Node) else state:
        b.pin(b.value(one), f"{origin(node)} takes it for its state")
    return b.plain_like(node)
