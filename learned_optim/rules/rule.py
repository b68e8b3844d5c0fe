"""What an update rule is: three stages that every caller shares, and a fourth for matrices in some rules.

``LearnedOptimizer.step`` runs the stages for one inner step without a graph; the meta-gradient records the first and the
last and replays the middle for a whole truncation; the fast backends fuse all three and are tested against them. A rule
knows nothing of optimizers, files or tasks.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from learned_optim.rules.lstm import Carry, LSTMTensors, lstm_sequence, lstm_step
from learned_optim.rules.orthogonal import MatrixStage

LARGEST_SIZE = 2**16
"""Most units in an LSTM layer, and most layers: beyond any use, and small enough that nothing overflows."""

PIECE = 2**20
"""Coordinates that a norm reads at once: float64 makes a copy of them, so a large tensor is read in pieces."""

Memory = dict[str, Tensor]
"""Per-coordinate memory by name: moments ``(N,)``, and ``hidden`` and ``cell`` ``(N, L * H)``."""

Advance = Callable[[Tensor, Carry, Tensor], tuple[Tensor, Carry]]
"""Maps inputs, carry and active mask to top hidden state and new carry: :meth:`UpdateRule.advance` or a kernel."""


@dataclass(frozen=True)
class RuleConfig:
    """Everything that is needed, beside the meta-parameters, to rebuild a rule.

    Args:
        hidden_size: Units per LSTM layer, H.
        num_layers: LSTM layers, L.
    """

    hidden_size: int = 20
    num_layers: int = 2

    def __post_init__(self) -> None:
        """Refuse impossible sizes; turn fields whose default is a float into floats, so that 100 equals 100.0.

        Raises:
            ValueError: If ``hidden_size`` or ``num_layers`` is no integer or outside 1 to 65,536, or another number
                is not finite.
        """
        for name in ("hidden_size", "num_layers"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise ValueError(f"{name} must lie between 1 and {LARGEST_SIZE:,}, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            if type(field.default) is float:
                object.__setattr__(self, field.name, finite(field.name, getattr(self, field.name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, ready for JSON."""
        return asdict(self)


def finite(name: str, value: Any) -> float:
    """Return the value of an option as a float.

    Args:
        name: The option.
        value: Any real number except a boolean.

    Returns:
        The same number.

    Raises:
        ValueError: If the value is no such number, is NaN, or exceeds the range of float32, in which rules compute.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be a number, finite in float32, got {value!r}")
    return float(number)


class Encoded(NamedTuple):
    """What :meth:`UpdateRule.encode` makes of one gradient.

    ``inputs`` ``(N, F)`` go to the LSTM. ``context`` ``(N, C)`` is what :meth:`UpdateRule.decode` needs beside the hidden
    state. ``active`` ``(N,)`` is true where a coordinate may move and its LSTM memory advances. ``moments`` are the new
    moments, each ``(N,)``.
    """

    inputs: Tensor
    context: Tensor
    active: Tensor
    moments: Memory


class UpdateRule(nn.Module, ABC):
    """A coordinatewise LSTM that turns a gradient into an update, which is *added* to the parameter.

    Every coordinate of every parameter runs the same network with its own memory (Andrychowicz et al. 2016,
    arXiv:1606.04474, section 2.1).

    A coordinate that has never had a non-zero gradient is at rest: its memory is exactly zero and it does not move. A
    coordinate whose gradient is not finite is skipped for that step: it does not move and keeps its memory.

    Args:
        config: The rule's typed configuration.
        num_inputs: Input features per coordinate, F.
        num_outputs: Numbers read out of the top hidden state.
    """

    family: ClassVar[str]
    moment_names: ClassVar[tuple[str, ...]] = ()
    momentum_names: ClassVar[tuple[str, ...]] = ()
    uses_scale: ClassVar[bool] = False
    config: RuleConfig

    def __init__(self, config: RuleConfig, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.config = config
        self.lstm = nn.LSTM(num_inputs, config.hidden_size, config.num_layers)
        self.readout = nn.Linear(config.hidden_size, num_outputs)
        self._frozen_lstm: LSTMTensors | None = None
        self._traced = False

    @property
    def matrix_stage(self) -> MatrixStage | None:
        """What shapes the updates of matrices after :meth:`decode`; None where a rule moves coordinates alone."""
        return None

    def raw_momentum(self, memory: Memory) -> Tensor | None:
        """Return the direction against a momentum of the gradients, or None where the rule keeps none.

        Args:
            memory: The memory after a step, with at least the moments in ``momentum_names``; any shape and floating dtype.

        Returns:
            The direction, in the shape and dtype of the moments.
        """
        return None

    def freeze(self) -> None:
        """Fix the meta-parameters, their dtype and device, for use without a graph; ``torch.compile`` needs it."""
        self.requires_grad_(False).eval()
        self.lstm.flatten_parameters()
        weights = [[weight.detach() for weight in layer] for layer in self.lstm.all_weights]
        self._frozen_lstm = LSTMTensors(self.lstm.hidden_size, weights)

    @property
    def lstm_weights(self) -> nn.LSTM | LSTMTensors:
        """What holds the LSTM's weights: the frozen tensors, or the module while they may still change."""
        return self.lstm if self._frozen_lstm is None else self._frozen_lstm

    def for_tracing(self) -> UpdateRule:
        """Return a view of this rule for a compiler to trace: meta-parameters are inputs, and the readout is a sum."""
        view = copy.copy(self)
        view._frozen_lstm, view._traced = None, True
        return view

    @property
    def memory_width(self) -> int:
        """Numbers in each of ``hidden`` and ``cell`` for one coordinate, ``L * H``."""
        return self.config.num_layers * self.config.hidden_size

    def initial_memory(self, num_coordinates: int, like: Tensor) -> Memory:
        """Return memory at rest for ``num_coordinates``, with the dtype and device of ``like``."""
        memory = {name: like.new_zeros(num_coordinates) for name in self.moment_names}
        memory["hidden"] = like.new_zeros(num_coordinates, self.memory_width)
        memory["cell"] = like.new_zeros(num_coordinates, self.memory_width)
        return memory

    def tensor_scale(self, param: Tensor, memory: Memory | None = None, done: Tensor | None = None) -> Tensor | None:
        """Return the one number that a rule may take from a whole tensor, or None where it takes none.

        The number is the root mean square of the parameter, within :meth:`scale_bounds`, times :meth:`agreement_factor`.
        It is computed before a tensor is cut into chunks or shards, so neither changes the update. Sums are taken in
        float64, so their order does not matter either. A tensor with a NaN counts as zeros, so the other tensors go on.

        Args:
            param: A parameter tensor.
            memory: The memory before the step, in the shape of ``param``; None leaves it out.
            done: Inner steps taken so far, 0-dim.

        Returns:
            A 0-dim tensor of the rule's dtype, or None.
        """
        if not self.uses_scale:
            return None
        numel = max(param.numel(), 1)
        scale = (_norm(param.detach(), 2) / numel**0.5).nan_to_num(0.0).clamp(*self.scale_bounds(numel))
        if memory is not None and done is not None and self.agreement_names:
            momentum, second_moment = (memory[name] for name in self.agreement_names)
            squares, sizes = _norm(momentum, 2).square(), _norm(second_moment, 1)
            scale = scale * self.agreement_factor(squares, sizes, done)
        return scale.to(self.readout.weight.dtype)

    def tensor_scales(
        self, params: Sequence[Tensor], memories: Sequence[Memory], done: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return :meth:`tensor_scale` of many tensors; a GPU needs a few launches, however many tensors there are.

        Args:
            params: Parameter tensors with at least one entry, all on one device.
            memories: The memory of each parameter.
            done: Inner steps that each has taken so far.

        Returns:
            A 0-dim tensor or None for each parameter.
        """
        together = self.uses_scale and all(param.is_cuda and type(param) in (Tensor, nn.Parameter) for param in params)
        if not together or torch.compiler.is_compiling():
            return [self.tensor_scale(*each) for each in zip(params, memories, done, strict=True)]
        norms = torch._foreach_norm([param.detach() for param in params], 2, dtype=torch.float64)
        norms = torch.stack(norms).nan_to_num(0.0).unbind()
        torch._foreach_div_(norms, [param.numel() ** 0.5 for param in params])
        floors, ceilings = zip(*(self.scale_bounds(param.numel()) for param in params), strict=True)
        torch._foreach_clamp_min_(norms, floors)
        torch._foreach_clamp_max_(norms, ceilings)
        scales = torch.stack(norms)
        if self.agreement_names:
            momenta, second_moments = ([memory[name] for memory in memories] for name in self.agreement_names)
            squares = torch.stack(torch._foreach_norm(momenta, 2, dtype=torch.float64)).square()
            sizes = torch.stack(torch._foreach_norm(second_moments, 1, dtype=torch.float64))
            scales = scales * self.agreement_factor(squares, sizes, torch.stack(list(done)).to(scales.device))
        return list(scales.to(self.readout.weight.dtype).unbind())

    @property
    def agreement_names(self) -> tuple[str, ...]:
        """The momentum and the second moment that :meth:`agreement_factor` compares; empty where a rule compares none."""
        return ()

    def agreement_factor(self, momentum_squares: Tensor, second_moments: Tensor, done: Tensor) -> Tensor:
        """Return how many times as long a tensor's steps are because its gradients agree.

        Args:
            momentum_squares: Sum of the squares of a momentum over the tensor, float64.
            second_moments: Sum of the second moment over the tensor, in the same shape.
            done: Inner steps taken so far, broadcast against both.

        Returns:
            The factor, float64.
        """
        return torch.ones_like(momentum_squares)

    def scale_bounds(self, numel: int) -> tuple[float, float]:
        """Return the floor and the ceiling of :meth:`tensor_scale`, which is a root mean square.

        Args:
            numel: Entries of the whole tensor.

        Returns:
            The floor and the ceiling.
        """
        return 0.0, math.inf

    def read_by_encode(self, memory: Memory) -> Memory:
        """Return the part of a memory that :meth:`encode` reads: views, not copies, for a caller that stores many steps.

        Args:
            memory: The memory before a step.

        Returns:
            A memory that :meth:`encode` accepts in place of the whole.
        """
        return {name: memory[name] for name in self.moment_names}

    @abstractmethod
    def encode(self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None) -> Encoded:
        """Turn a gradient into LSTM inputs and update the moments.

        Args:
            grad: ``(N,)``, in the rule's dtype. May hold NaN or Inf; those coordinates become inactive.
            memory: The memory before this step. Not modified.
            step: Inner steps including this one (1 for the first), 0-dim or ``(N,)``.
            scale: :meth:`tensor_scale` of each coordinate's tensor, 0-dim or ``(N,)``; None where the rule takes none.

        Returns:
            Inputs, context, active mask and new moments.
        """

    @abstractmethod
    def decode(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Read the update out of the top hidden state.

        Args:
            hidden: ``(..., N, H)``; leading dimensions are inner steps.
            context: ``(..., N, C)`` from :meth:`encode`; zero where a coordinate is inactive, so that the update is zero.

        Returns:
            The update, ``(..., N)``.
        """

    def read(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Apply the readout, for :meth:`decode`.

        Args:
            hidden: ``(..., N, H)``.

        Returns:
            The numbers of the readout, each ``(..., N)``.
        """
        by_sums = self._traced or torch.compiler.is_compiling()
        return self.read_by_sums(hidden) if by_sums else self.readout(hidden).unbind(-1)

    def read_by_sums(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Apply the readout like :meth:`read`, for compilers: they fuse a sum with its neighbours, but not a matmul.

        Args:
            hidden: ``(..., N, H)``.

        Returns:
            The numbers of the readout, each ``(..., N)``.
        """
        rows = zip(self.readout.weight.unbind(), self.readout.bias.unbind(), strict=True)
        return tuple((hidden * weight).sum(-1) + bias for weight, bias in rows)

    def recur(self, inputs: Tensor, carry: Carry, *, fused: bool = False) -> tuple[Tensor, Carry]:
        """Run the LSTM over a sequence of inputs.

        Args:
            inputs: ``(K, N, F)``.
            carry: Hidden and cell before the first step, each ``(N, L * H)``.
            fused: Call ``nn.LSTM`` (faster, not traceable by ``torch.compile``) instead of K matmul cells.

        Returns:
            Top hidden states ``(K, N, H)`` and the carry after the last step.
        """
        if fused:
            return lstm_sequence(self.lstm, inputs, carry)
        lstm = self.lstm_weights
        hiddens = []
        for step_inputs in inputs:
            hidden, carry = lstm_step(lstm, step_inputs, carry)
            hiddens.append(hidden)
        return torch.stack(hiddens), carry

    def advance(self, inputs: Tensor, carry: Carry, active: Tensor) -> tuple[Tensor, Carry]:
        """Run the LSTM for one inner step; coordinates that are not active keep their memory.

        Args:
            inputs: ``(N, F)``.
            carry: Hidden and cell, each ``(N, L * H)``.
            active: ``(N,)`` bool.

        Returns:
            The top hidden state ``(N, H)``, not held, and the new carry, held.
        """
        hiddens, new_carry = self.recur(inputs.unsqueeze(0), carry)
        moves = active.unsqueeze(-1)
        return hiddens.squeeze(0), (
            torch.where(moves, new_carry[0], carry[0]),
            torch.where(moves, new_carry[1], carry[1]),
        )

    def forward(
        self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None, advance: Advance | None = None
    ) -> tuple[Tensor, Memory, Encoded]:
        """Take one inner step: encode, advance, decode.

        Args:
            grad: ``(N,)``.
            memory: The memory before this step. Not modified.
            step: Inner steps including this one, 0-dim or ``(N,)``.
            scale: :meth:`tensor_scale` of each coordinate's tensor, or None.
            advance: A faster equivalent of :meth:`advance`, from ``backends``.

        Returns:
            The update ``(N,)``, the new memory, and the encoded gradient for a caller that records it.
        """
        encoded = self.encode(grad, memory, step, scale)
        advance = self.advance if advance is None else advance
        hidden, (kept_hidden, kept_cell) = advance(encoded.inputs, (memory["hidden"], memory["cell"]), encoded.active)
        update = self.decode(hidden, encoded.context)
        return update, {**encoded.moments, "hidden": kept_hidden, "cell": kept_cell}, encoded


def _norm(tensor: Tensor, order: int) -> Tensor:
    """Return a norm of a whole tensor in float64; read a large tensor piece by piece, to save memory."""
    if tensor.numel() > PIECE and type(tensor) is Tensor and not torch.compiler.is_compiling():
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor
        pieces = flat.split(max(PIECE * len(flat) // flat.numel(), 1))
        wide = torch.empty_like(pieces[0], dtype=torch.float64)
        norms = [torch.linalg.vector_norm(wide[: len(piece)].copy_(piece), order) for piece in pieces]
        return torch.linalg.vector_norm(torch.stack(norms), order)
    norm = torch.linalg.vector_norm(tensor, order, dtype=torch.float64)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
