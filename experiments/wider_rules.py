"""The default rule with one input more, which no kernel knows: for the exploration alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from learned_optim.rules import AdamModulationConfig, AdamModulationRule, Memory
from learned_optim.rules.rule import Encoded
from meta_train.tasks import Optimizee
from meta_train.training.inner_steps import PlainSteps
from meta_train.training.parts import Parts

Average = Callable[[Tensor], Tensor]
"""From a number for each coordinate to the mean over its tensor."""


class WiderRule(AdamModulationRule):
    """Reads one number more for each coordinate, which whoever steps has noted in the memory."""

    def __init__(self, config: AdamModulationConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(self.lstm.input_size + 1, config.hidden_size, config.num_layers)

    @abstractmethod
    def note(self, params: Tensor, memory: Memory, step: int, average: Average) -> Tensor:
        """Return what to note for the next inner step.

        Args:
            params: ``(N,)``, where the coordinates stand.
            memory: After the last inner step.
            step: Inner steps taken.
            average: Over tensors.

        Returns:
            ``(N,)``.
        """

    @abstractmethod
    def feature(self, noted: Tensor, scale: Tensor) -> Tensor:
        """Turn notes ``(N,)`` into an input."""

    def initial_memory(self, num_coordinates: int, like: Tensor) -> Memory:
        """Return memory at rest, with room for notes."""
        return {**super().initial_memory(num_coordinates, like), "noted": like.new_zeros(num_coordinates)}

    def read_by_encode(self, memory: Memory) -> Memory:
        """Return the moments and the notes."""
        return {**super().read_by_encode(memory), "noted": memory["noted"]}

    def encode(self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None) -> Encoded:
        """Add the notes to what the LSTM reads."""
        assert scale is not None
        seen = super().encode(grad, memory, step, scale)
        return seen._replace(inputs=torch.cat((seen.inputs, self.feature(memory["noted"], scale).unsqueeze(-1)), -1))


class ValueRule(WiderRule):
    """Reads the parameter's value in units of its tensor's size."""

    def note(self, params: Tensor, memory: Memory, step: int, average: Average) -> Tensor:
        """Return the values."""
        return params

    def feature(self, noted: Tensor, scale: Tensor) -> Tensor:
        """Divide by the size."""
        return (noted / scale).clamp(-5, 5)


class TensorRule(WiderRule):
    """Reads how much of its whole tensor's gradient is signal, so that the tensor can have a magnitude of its own."""

    def note(self, params: Tensor, memory: Memory, step: int, average: Average) -> Tensor:
        """Return the tensor's mean of the squared momentum over the mean squared gradient, between 0 and about 1."""
        if step == 0:
            return torch.zeros_like(params)
        momentum = memory["exp_avg"] / (1 - self.config.fast_decay**step)
        square = memory["exp_avg_sq"] / (1 - self.config.second_moment_decay**step)
        return average(momentum.square() / square.clamp(min=torch.finfo(square.dtype).tiny))

    def feature(self, noted: Tensor, scale: Tensor) -> Tensor:
        """Take the logarithm of its root: pure noise has about -1, pure signal 0."""
        return 0.5 * torch.log(noted + 1e-4)


def build_wider_rule(wider: type[WiderRule], family: str, **options: object) -> WiderRule:
    """Return a wider rule in the place of the family's."""
    return wider(AdamModulationConfig(**options))  # type: ignore[arg-type]


class NotingSteps(PlainSteps):
    """Inner steps that note in the memory what the rule wants to read."""

    def __init__(self, rule: Parts, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        super().__init__(rule, optimizee, params, memory)
        if not memory["noted"].any():
            self._note(0)

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        super().take(grad, step, scales)
        self._note(step)

    def _note(self, step: int) -> None:
        rule = self.rule.shared
        assert isinstance(rule, WiderRule)
        noted = rule.note(self.params.flatten(), self.memory, step, self._average)
        self.memory = {**self.memory, "noted": noted}

    def _average(self, values: Tensor) -> Tensor:
        means = values.view_as(self.params).double() @ self.optimizee.tensor_means
        return means.to(values)[:, self.optimizee.tensor_index].flatten()


class WiderOptimizer(torch.optim.Optimizer):
    """Applies a rule to a model."""

    def __init__(self, params: Iterable[Tensor], rule: WiderRule) -> None:
        super().__init__(params, {})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one inner step."""
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(memory=self.rule.initial_memory(param.numel(), param), step=0)
            noted = self.rule.note(param.flatten(), state["memory"], state["step"], _mean)
            state["step"] += 1
            memory = {**state["memory"], "noted": noted}
            step = torch.tensor(float(state["step"]))
            scale = self.rule.tensor_scale(param, memory, step - 1)
            update, state["memory"], _ = self.rule(param.grad.flatten(), memory, step, scale)
            param.add_(update.view_as(param))


def _mean(values: Tensor) -> Tensor:
    return values.mean().expand_as(values)
