"""The default family: a small LSTM that modulates a nominal Adam step.

Inputs and output are scale-free, so neither the scale of the loss nor the scale of a layer matters within the range
of float32. A gradient above 1.8e19 squares to Inf and is skipped; a gradient below 1e-21 leaves a second moment of 0 and
moves nothing. The output is bounded, so no state of the LSTM can make a step explode. With a zero readout the rule *is*
Adam with a step relative to the tensor.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from learned_optim.rules.orthogonal import MatrixStage
from learned_optim.rules.rule import Encoded, Memory, RuleConfig, UpdateRule, finite


@dataclass(frozen=True)
class AdamModulationConfig(RuleConfig):
    """Configuration of :class:`AdamModulationRule`.

    Args:
        hidden_size: Units per LSTM layer.
        num_layers: LSTM layers.
        fast_decay: Decay of the fast momentum, which is also the nominal direction.
        slow_decay: Decay of the slow momentum.
        second_moment_decay: Decay of the mean squared gradient.
        outlier_bound: A gradient counts for at most this many times the root of the mean square before it, so that one bad
            example does not stop the steps after it; 0: every gradient counts in full.
        time_scales: Inner steps; each gives an input ``tanh(t / scale - 1)``. Empty: the rule sees no time.
        step_size: Size of a nominal step relative to the root mean square of the tensor.
        min_scale: Floor of that root mean square, for tensors that start at zero.
        small_min_scale: A higher floor for tensors with fewer entries, N: ``0.5 * N ** -0.25``, about torch's
            initial scale of a square matrix with N entries, but no more than this. 0: no higher floor.
        max_scale: Ceiling of that root mean square.
        anneal_power: The nominal step shrinks as ``(1 + t / anneal_steps) ** -anneal_power``, where t counts inner steps
            from ``anneal_start`` on; 0: it never shrinks.
        anneal_steps: Time scale of the shrinking, in inner steps.
        anneal_start: Inner steps before the shrinking begins.
        log_gain: Bound on the logarithm of the modulation: steps lie within ``e^+-log_gain`` of the nominal size.
        matrix_blend: How far the update of a matrix goes towards the orthogonal one; 0: there is no matrix stage.
        matrix_momentum: Share of the raw momentum, ``-(m + n)``, in the direction that is orthogonalised.
        matrix_gain: Length of the orthogonal update, relative to the update that the LSTM made.
        matrix_smallest_side: Fewest rows and columns of a matrix that takes part.
        agreement_gain: How much longer the steps of a tensor are where its gradients agree; 0: no longer. See
            :meth:`AdamModulationRule.agreement_factor`.
        agreement_floor: Agreement up to which steps keep their length; noise has an agreement of 1.
        agreement_limit: Largest factor by which agreement lengthens a step.
    """

    hidden_size: int = 8
    num_layers: int = 1
    fast_decay: float = 0.9
    slow_decay: float = 0.99
    second_moment_decay: float = 0.999
    outlier_bound: float = 0.0
    time_scales: tuple[float, ...] = ()
    step_size: float = 3e-3
    min_scale: float = 1e-2
    small_min_scale: float = 0.0
    max_scale: float = 1.0
    anneal_power: float = 0.0
    anneal_steps: float = 100.0
    anneal_start: float = 0.0
    log_gain: float = 3.0
    matrix_blend: float = 0.0
    matrix_momentum: float = 0.0
    matrix_gain: float = 1.0
    matrix_smallest_side: int = 2
    agreement_gain: float = 0.0
    agreement_floor: float = 1.1
    agreement_limit: float = 8.0

    @property
    def noise_share(self) -> float:
        """Mean square of the slow momentum under pure noise, as a share of the noise's second moment."""
        return (1 - self.slow_decay) / (1 + self.slow_decay)

    def __post_init__(self) -> None:
        """Refuse values with no meaning.

        Raises:
            ValueError: If a size is no integer or below 1, or another number is not finite, or a decay lies outside
                [0, 1), or a scale, step size or gain is not positive, or ``outlier_bound``, ``small_min_scale``,
                ``anneal_power``, ``anneal_start``, ``agreement_gain`` or ``agreement_floor`` is negative, or
                ``agreement_limit`` is below 1, or a share of the matrix stage lies outside [0, 1].
        """
        super().__post_init__()
        object.__setattr__(self, "time_scales", tuple(finite("time_scales", scale) for scale in self.time_scales))
        for name in ("fast_decay", "slow_decay", "second_moment_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("matrix_blend", "matrix_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if type(self.matrix_smallest_side) is not int or self.matrix_smallest_side < 2:
            raise ValueError(f"matrix_smallest_side must be an integer from 2 on, got {self.matrix_smallest_side!r}")
        if not self.agreement_limit >= 1:
            raise ValueError(f"agreement_limit must be at least 1, got {self.agreement_limit}")
        for name in ("step_size", "min_scale", "max_scale", "anneal_steps", "log_gain", "matrix_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            *("outlier_bound", "small_min_scale", "anneal_power", "anneal_start"),
            *("agreement_gain", "agreement_floor"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if any(not scale > 0 for scale in self.time_scales):
            raise ValueError(f"time_scales must be positive, got {self.time_scales}")


class AdamModulationRule(UpdateRule):
    r"""A bounded, learned modulation of Adam's direction plus a bounded learned direction.

    Gradients ``g`` are bounded by ``outlier_bound * sqrt(v)``, with the ``v`` of the step before. ``m`` and ``n`` are their
    fast and slow momentum, ``v`` is their mean square, and all three are bias-corrected::

        inputs  = (g, m, n) / sqrt(v),  log(g^2 / v),  tanh(t / tau - 1) for each time scale
        a, b    = linear(LSTM(inputs))
        update  = -step_size * scale * anneal(t) * exp(c tanh(a / c)) * (m / sqrt(v) + tanh(b)),       c = log_gain

    Where the configuration has a matrix stage, :class:`~learned_optim.rules.orthogonal.MatrixStage` shapes the updates of
    whole matrices after that.

    ``scale`` is the root mean square of the whole parameter tensor, clamped, times :meth:`agreement_factor`; ``anneal`` is a
    power law, which the modulation may bend but need not discover. So the rule goes on settling long after the longest
    episode of its training. A coordinate with ``v = 0`` does not move.

    Args:
        config: Decays, scales and bounds.

    References:
        Inputs after RNNprop (Lv et al. 2017, arXiv:1703.03633); a nominal step under a magnitude head after STAR
        (Harrison et al. 2022, arXiv:2209.11208), here bounded; scale by the tensor's size after VeLO
        (arXiv:2211.09760). The bound on outliers is the spike-aware clipping of SPAM (Huang et al. 2025, arXiv:2501.06842),
        here with bias correction and without its resets of the momenta.
    """

    family: ClassVar[str] = "adam-modulation"
    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    momentum_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_slow")
    uses_scale: ClassVar[bool] = True
    config: AdamModulationConfig

    def __init__(self, config: AdamModulationConfig) -> None:
        super().__init__(config, num_inputs=4 + len(config.time_scales), num_outputs=2)
        # Start as the nominal optimizer: an untrained modulation is worse than none.
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    @property
    def matrix_stage(self) -> MatrixStage | None:
        """The stage that shapes updates of matrices; None without ``matrix_blend``."""
        config = self.config
        if not config.matrix_blend:
            return None
        return MatrixStage(config.matrix_blend, config.matrix_momentum, config.matrix_gain, config.matrix_smallest_side)

    def raw_momentum(self, memory: Memory) -> Tensor | None:
        """Return minus the sum of both momenta, which the matrix stage may follow."""
        return -(memory["exp_avg"] + memory["exp_avg_slow"])

    def scale_bounds(self, numel: int) -> tuple[float, float]:
        """Return the bounds of a tensor's root mean square."""
        config = self.config
        floor = max(config.min_scale, min(config.small_min_scale, 0.5 * numel**-0.25))
        return min(floor, config.max_scale), config.max_scale

    @property
    def agreement_names(self) -> tuple[str, ...]:
        """The slow momentum and the second moment, where the configuration has an ``agreement_gain``."""
        return ("exp_avg_slow", "exp_avg_sq") if self.config.agreement_gain else ()

    def agreement_factor(self, momentum_squares: Tensor, second_moments: Tensor, done: Tensor) -> Tensor:
        """Return how many times as long a tensor's steps are because its gradients agree.

        The slow momentum ``n``, with decay d, averages gradients of second moment ``v``. Its mean square rises to
        ``v (1 - d) / (1 + d)`` where they are noise, and to ``v`` where they agree. The agreement is therefore ::

            a      = sqrt(sum(n^2) / sum(v) * (1 + d) / (1 - d))
            factor = min(exp(agreement_gain * max(a - agreement_floor, 0)), agreement_limit)

        Noise has ``a = 1``. Neither rare nor shrinking gradients raise ``a``. ``v`` is corrected for its bias and ``n`` is
        not, so the first steps are never long.

        Args:
            momentum_squares: Sum of ``n^2`` over the tensor before this step, float64.
            second_moments: Sum of ``v`` over the tensor before this step, not corrected for its bias.
            done: Inner steps taken so far.

        Returns:
            The factor; 1 where nothing is known yet.
        """
        config = self.config
        corrected = second_moments / (1 - config.second_moment_decay ** done.double())
        agreement = (momentum_squares / (corrected * config.noise_share)).sqrt().nan_to_num(0.0, 0.0, 0.0)
        longer = (config.agreement_gain * (agreement - config.agreement_floor)).clamp(0.0, math.log(config.agreement_limit))
        return torch.exp(longer)

    def anneal(self, step: Tensor) -> Tensor:
        """Return the share of the nominal step size that is left.

        Args:
            step: Inner steps including this one.

        Returns:
            A tensor of the same shape.
        """
        since = (step - self.config.anneal_start).clamp(min=0)
        return (1 + since / self.config.anneal_steps) ** -self.config.anneal_power

    def encode(self, grad: Tensor, memory: Memory, step: Tensor, scale: Tensor | None) -> Encoded:
        """Update the moments and normalise gradient and momenta by the root of the second moment."""
        assert scale is not None, "this rule needs tensor_scale() of every tensor"
        config = self.config
        finite = (grad * grad).isfinite()  # A second moment of Inf would never recover.
        grad = torch.where(finite, grad, 0.0)
        bias_correction = 1 - config.second_moment_decay**step
        if config.outlier_bound:
            previous = memory["exp_avg_sq"]
            bound = config.outlier_bound * (previous / bias_correction).sqrt()
            grad = torch.where(previous > 0, grad.clamp(-bound, bound), grad)
        moments = {}
        for name, decay, value in (
            ("exp_avg", config.fast_decay, grad),
            ("exp_avg_slow", config.slow_decay, grad),
            ("exp_avg_sq", config.second_moment_decay, grad * grad),
        ):
            moments[name] = torch.where(finite, torch.lerp(value, memory[name], decay), memory[name])
        active = finite & (moments["exp_avg_sq"] > 0)

        second_moment = moments["exp_avg_sq"] / bias_correction
        inverse_root = torch.where(active, second_moment, 1.0).rsqrt()
        normalised = grad * inverse_root
        fast = moments["exp_avg"] / (1 - config.fast_decay**step) * inverse_root
        slow = moments["exp_avg_slow"] / (1 - config.slow_decay**step) * inverse_root
        log_ratio = 0.1 * torch.log(normalised * normalised + 1e-8)
        features = [normalised.clamp(-5.0, 5.0), fast, slow, log_ratio]
        features += [torch.tanh(step / tau - 1).to(grad.dtype).expand_as(grad) for tau in config.time_scales]
        amplitude = active * (-config.step_size * scale * self.anneal(step))
        context = torch.stack((fast, amplitude.to(grad.dtype))).t()
        return Encoded(torch.stack(features).t(), context, active, moments)

    def decode(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Return the modulated Adam step plus the bounded learned direction, zero where inactive."""
        magnitude, direction = self.read(hidden)
        nominal, amplitude = context.unbind(-1)
        bound = self.config.log_gain
        return amplitude * torch.exp(bound * torch.tanh(magnitude / bound)) * (nominal + torch.tanh(direction))


def plain_adam(lr: float) -> AdamModulationRule:
    """Return the member of this family that is Adam: every tensor's scale is 1, and every meta-parameter 0.

    Args:
        lr: Adam's rate.

    Returns:
        The rule.
    """
    with torch.random.fork_rng(devices=[]):
        rule = AdamModulationRule(AdamModulationConfig(hidden_size=1, step_size=lr, min_scale=1.0, max_scale=1.0))
    for parameter in rule.parameters():
        nn.init.zeros_(parameter)
    return rule
