"""The rules of the 2016 paper: raw or log-and-sign gradients in, a linear readout out."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from learned_optim.rules.rule import Encoded, Memory, RuleConfig, UpdateRule


@dataclass(frozen=True)
class PaperRuleConfig(RuleConfig):
    """Configuration of :class:`PaperRule`.

    Args:
        hidden_size: Units per LSTM layer.
        num_layers: LSTM layers.
        inputs: ``"raw"`` feeds the gradient itself, ``"log_and_sign"`` the two numbers of :func:`log_and_sign`.
        preprocess_p: The p of :func:`log_and_sign`; unused with raw inputs.
        input_scale: Constant factor on raw gradients. A loss that is the mean of M functions has gradients M times smaller
            than each function alone; ``input_scale = M`` undoes that.
        output_scale: Constant factor on the readout.
    """

    inputs: Literal["raw", "log_and_sign"] = "raw"
    preprocess_p: float = 10.0
    input_scale: float = 1.0
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values with no meaning.

        Raises:
            ValueError: If a size is no integer or below 1, ``inputs`` is unknown, ``preprocess_p`` or a scale is not finite
                and positive, or ``preprocess_p`` is so large that ``e^-p`` underflows in float32.
        """
        super().__post_init__()
        if self.inputs not in ("raw", "log_and_sign"):
            raise ValueError(f"inputs must be 'raw' or 'log_and_sign', got {self.inputs!r}")
        for name in ("preprocess_p", "input_scale", "output_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if math.exp(-self.preprocess_p) < torch.finfo(torch.float32).tiny:
            raise ValueError(f"preprocess_p must be at most 87, or e^-p underflows in float32, got {self.preprocess_p}")


def log_and_sign(grad: Tensor, p: float = 10.0) -> Tensor:
    """Split a gradient into log-magnitude and sign, so that one LSTM can read gradients of very different sizes.

    With ``|g| >= e^-p`` a coordinate becomes ``(log|g| / p, sign g)``, below that ``(-1, e^p g)``; the branches meet.

    Args:
        grad: Gradient of any shape and floating dtype. Not modified.
        p: Sets where the branches meet; ``p = 10`` means 4.5e-5.

    Returns:
        Tensor of shape ``(*grad.shape, 2)`` and the dtype of ``grad``, finite and with finite derivative also at 0.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, Appendix A.
    """
    threshold = math.exp(-p)
    log = torch.log(grad.abs().clamp(min=threshold)) / p
    sign = (grad / threshold).clamp(-1.0, 1.0)
    return torch.stack((log, sign), -1)


class PaperRule(UpdateRule):
    """``update = output_scale * linear(LSTM(preprocess(gradient)))`` for each coordinate.

    Args:
        config: Sizes, input preprocessing and output scale.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 2.1 and Appendix A. Departure: a coordinate that has never had a
        non-zero gradient does not move (in the paper, the LSTM's biases move it).
    """

    family: ClassVar[str] = "paper"
    config: PaperRuleConfig

    def __init__(self, config: PaperRuleConfig) -> None:
        super().__init__(config, num_inputs=1 if config.inputs == "raw" else 2, num_outputs=1)

    def read_by_encode(self, memory: Memory) -> Memory:
        """Return the bottom layer's cells, which tell whether a coordinate is at rest."""
        return {"cell": memory["cell"][..., : self.config.hidden_size]}

    def encode(self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None) -> Encoded:
        """Preprocess the gradient; a coordinate is active once its gradient or its memory has left zero."""
        finite = grad.isfinite()
        grad = torch.where(finite, grad, 0.0)
        bottom = memory["cell"][..., : self.config.hidden_size]
        active = finite & ((grad != 0) | (bottom.abs().amax(-1) != 0))
        if self.config.inputs == "raw":
            inputs = (grad * self.config.input_scale).unsqueeze(-1)
        else:
            inputs = log_and_sign(grad, self.config.preprocess_p)
        context = (active.to(grad.dtype) * self.config.output_scale).unsqueeze(-1)
        return Encoded(inputs, context, active, {})

    def decode(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Return ``output_scale * linear(hidden)``, zero where inactive."""
        (update,) = self.read(hidden)
        return update * context.squeeze(-1)
