"""The default rule with one input more, the parameter's value in units of its tensor's size: for the exploration alone."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from learned_optim.rules import AdamModulationConfig, AdamModulationRule, Memory
from learned_optim.rules.rule import Encoded
from meta_train.inner_steps import PlainSteps
from meta_train.tasks import Optimizee


class ValueRule(AdamModulationRule):
    """Reads the values of the parameters out of the memory, where whoever steps has put them."""

    def __init__(self, config: AdamModulationConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(self.lstm.input_size + 1, config.hidden_size, config.num_layers)

    def initial_memory(self, num_coordinates: int, like: Tensor) -> Memory:
        """Return memory at rest, with room for the values."""
        return {**super().initial_memory(num_coordinates, like), "value": like.new_zeros(num_coordinates)}

    def read_by_encode(self, memory: Memory) -> Memory:
        """Return the moments and the values."""
        return {**super().read_by_encode(memory), "value": memory["value"]}

    def encode(self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None) -> Encoded:
        """Add the values to what the LSTM reads."""
        assert scale is not None
        seen = super().encode(grad, memory, step, scale)
        value = (memory["value"] / scale).clamp(-5, 5)
        return seen._replace(inputs=torch.cat((seen.inputs, value.unsqueeze(-1)), -1))


def build_value_rule(family: str, **options: object) -> ValueRule:
    """Return the rule in the place of the family's."""
    return ValueRule(AdamModulationConfig(**options))  # type: ignore[arg-type]


class ValueSteps(PlainSteps):
    """Inner steps that put the values into the memory."""

    def __init__(self, rule: AdamModulationRule, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        super().__init__(rule, optimizee, params, {**memory, "value": params.flatten()})

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        super().take(grad, step, scales)
        self.memory["value"] = self.params.flatten()


class ValueOptimizer(torch.optim.Optimizer):
    """Applies the rule to a model."""

    def __init__(self, params: Iterable[Tensor], rule: ValueRule) -> None:
        super().__init__(params, {})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one inner step."""
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(memory=self.rule.initial_memory(param.numel(), param), step=torch.zeros(()))
            state["step"] += 1
            memory = {**state["memory"], "value": param.flatten()}
            scale = self.rule.tensor_scale(param)
            update, state["memory"], _ = self.rule(param.grad.flatten(), memory, state["step"], scale)
            param.add_(update.view_as(param))
