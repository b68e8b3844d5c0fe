r"""Import update rules of the 2016 code (google-deepmind/learning-to-learn): LSTM variables of Sonnet 1.

There a layer computes, with one weight matrix for input and hidden state and one bias::

    i, j, f, o = split([x; h] w_gates + b_gates)
    c = sigmoid(f + 1) c + sigmoid(i) tanh(j),        h = sigmoid(o) tanh(c)

and the update is ``scale * (h linear.w + linear.b)``. Here the same numbers are an ``nn.LSTM``, whose gates are called
(i, f, g, o), with the forget bias of 1 added to the bias once and for all.

A file holds the arrays and nothing else, so what preceded and followed the LSTM is what the original configuration says:
log-and-sign inputs with k = 5 and a scale of 0.01 where the LSTM reads two numbers, the gradient itself and a scale of 1
where it reads one.
"""

from __future__ import annotations

import hashlib
import math
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from learned_optim.rules import build_rule
from learned_optim.weights.container import parse
from learned_optim.weights.errors import WeightsError
from learned_optim.weights.file_format import SUFFIX, check_finite, read_bytes
from learned_optim.weights.l2l_pickle import read_arrays
from learned_optim.weights.text import one_line
from learned_optim.weights.weights import Weights

FORGET_BIAS = 1.0
TF_EPSILON = 2.0**-23
"""What the original adds to the absolute gradient before the logarithm."""

OTHER_RULES = {
    "input_projection": (
        "it is RNNprop (arXiv:1703.03633): normalised moments through a learned projection and ELU, the output bounded by "
        "tanh. No rule family here computes that"
    ),
    "w_i_diag": "its LSTM has peepholes",
    "w_f_diag": "its LSTM has peepholes",
    "w_o_diag": "its LSTM has peepholes",
}


def read_sonnet(
    path: str | PathLike[str],
    *,
    preprocess_p: float = 5.0,
    output_scale: float | None = None,
    license: str = "unknown",
) -> Weights:
    """Read weights of the original code: an ``.l2l`` file, or the same arrays as safetensors ``module.variable``.

    Nothing in the file is run. The rule computes what the original did to float32 rounding, except for what
    ``metadata["differences"]`` of the result says.

    Args:
        path: The file. One that ends in ``.safetensors`` is read as that, any other as an ``.l2l`` pickle.
        preprocess_p: k of the original's ``LogAndSign``; unused with raw inputs.
        output_scale: The original's ``scale``; by default 0.01 with log-and-sign inputs and 1 with raw ones.
        license: Licence of the file, as an SPDX identifier in lower case; kept in the metadata.

    Returns:
        The weights, called as the file.

    Raises:
        WeightsError: If the file cannot be read, asks to run code, or holds a rule that cannot be represented here.
    """
    path = Path(path)
    data = read_bytes(path)
    arrays, metadata = _safetensors(data, str(path)) if path.suffix == SUFFIX else (read_arrays(data, str(path)), {})
    variables = {f"{module}.{name}": array for module, found in arrays.items() for name, array in found.items()}
    check_finite(variables, str(path))
    hidden_size, num_layers, num_inputs = _sizes(variables, str(path))
    raw = num_inputs == 1
    try:
        rule = build_rule(
            "paper",
            hidden_size=hidden_size,
            num_layers=num_layers,
            inputs="raw" if raw else "log_and_sign",
            preprocess_p=10.0 if raw else float(preprocess_p),
            output_scale=output_scale if output_scale is not None else 1.0 if raw else 0.01,
        )
        differences = _differences(raw, preprocess_p)
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{path}: {error}") from error
    rule.load_state_dict(_state_dict(variables, num_layers, num_inputs))
    return Weights(
        rule,
        path.name.split(".")[0],
        metadata={
            **metadata,
            "converted_from": f"{path.name}, sha256 {hashlib.sha256(data).hexdigest()}",
            "differences": differences,
            "license": license,
        },
    )


def _safetensors(data: bytes, source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    container = parse(data, source)
    if "learned_optim_format" in container.strings:
        raise WeightsError(f"{source} is a weight file already; use it as it is")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, entry in container.entries.items():
        module, _, variable = name.rpartition(".")
        if entry.dtype != "F32":
            raise WeightsError(
                f"{source}: {one_line(name, 60)} is {one_line(entry.dtype, 20)}; the original code writes F32"
            )
        modules.setdefault(module, {})[variable] = container.tensor(name)
    return modules, {key: container.strings[key] for key in ("source",) if key in container.strings}


def _sizes(variables: dict[str, Tensor], source: str) -> tuple[int, int, int]:
    """Return hidden size, layers and inputs; refuse what is not a coordinatewise LSTM of the paper's family."""
    for name in variables:
        for part in name.split("."):
            if part in OTHER_RULES:
                raise WeightsError(f"{source} cannot be converted: {OTHER_RULES[part]} (it holds {one_line(name, 60)})")
    num_layers = sum(name.endswith(".w_gates") for name in variables)
    layers = [f"lstm_{layer}" for layer in range(1, num_layers + 1)]
    expected = {f"{layer}.{kind}_gates" for layer in layers for kind in "wb"} | {"linear.w", "linear.b"}
    if not layers or (odd := sorted(expected ^ set(variables))):
        lacks = ", ".join(odd) if layers else "lstm_1.w_gates"
        raise WeightsError(
            f"{source} cannot be converted: a rule of the paper is lstm_1, lstm_2 ... (w_gates, b_gates) and linear (w, b), "
            f"and this file differs in {one_line(lacks, 200)}"
        )
    readout = tuple(variables["linear.w"].shape)
    hidden_size = readout[0] if readout else 0
    rows = tuple(variables["lstm_1.w_gates"].shape)[:1]
    num_inputs = rows[0] - hidden_size if rows else 0
    if readout[1:] != (1,) or num_inputs not in (1, 2):
        raise WeightsError(
            f"{source} cannot be converted: it reads {num_inputs} numbers and linear.w has shape {readout}; a "
            "coordinatewise rule reads 1 (the gradient) or 2 (its logarithm and sign) and writes 1"
        )
    for layer, name in enumerate(layers):
        below = hidden_size if layer else num_inputs
        for variable, shape in (("w_gates", (below + hidden_size, 4 * hidden_size)), ("b_gates", (4 * hidden_size,))):
            if tuple(variables[f"{name}.{variable}"].shape) != shape:
                raise WeightsError(
                    f"{source} cannot be converted: {name}.{variable} has shape "
                    f"{tuple(variables[f'{name}.{variable}'].shape)}, and {hidden_size} units in every layer need {shape}"
                )
    if tuple(variables["linear.b"].shape) != (1,):
        raise WeightsError(
            f"{source} cannot be converted: linear.b has shape {tuple(variables['linear.b'].shape)}, not (1,)"
        )
    return hidden_size, num_layers, num_inputs


def _state_dict(variables: dict[str, Tensor], num_layers: int, num_inputs: int) -> dict[str, Tensor]:
    """Reorder and split the arrays as ``nn.LSTM`` and ``nn.Linear`` name them."""
    state = {"readout.weight": variables["linear.w"].t(), "readout.bias": variables["linear.b"]}
    below = num_inputs
    for layer in range(num_layers):
        weight, bias = (variables[f"lstm_{layer + 1}.{kind}_gates"] for kind in "wb")
        write, candidate, forget, read = weight.t().chunk(4)
        gates = torch.cat((write, forget, candidate, read))
        write, candidate, forget, read = bias.chunk(4)
        state[f"lstm.weight_ih_l{layer}"], state[f"lstm.weight_hh_l{layer}"] = gates[:, :below], gates[:, below:]
        state[f"lstm.bias_ih_l{layer}"] = torch.cat((write, forget + FORGET_BIAS, candidate, read))
        state[f"lstm.bias_hh_l{layer}"] = torch.zeros_like(bias)
        below = len(bias) // 4
    return state


def _differences(raw: bool, p: float) -> str:
    rest = "a coordinate that never had a non-zero gradient does not move, where the original's biases move it"
    if raw:
        return rest
    bound = TF_EPSILON * math.exp(p) / p
    return f"the first input is log|g| / {p:g}, not log(|g| + 2^-23) / {p:g}, which differs by {bound:.1e} at most; {rest}"
