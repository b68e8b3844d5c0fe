"""The two synthetic tasks that need nothing but a random generator."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from meta_train.tasks.task import Count, Optimizee, Params, seeded


class Quadratic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="quadratic"):
    """Random least squares: the mean over a batch of functions of ``||W theta - y||^2``, from ``theta = 0``.

    Args:
        dimension: Size of theta; W is square.
        functions: Functions in the batch; the loss is their mean, so gradients shrink with it.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.1: W and y iid Gaussian. Departure: the batch, as in DeepMind's
        code (which draws W and y uniformly).
    """

    dimension: Count = 10
    functions: Count = 128

    def sample(self, seed: int) -> Optimizee:
        """Return a fresh batch of functions.

        Args:
            seed: Decides W and y.

        Returns:
            One problem (P = 1) whose parameter ``theta`` is ``(1, functions, dimension)``.
        """
        generator = seeded(seed)
        weight = torch.randn(self.functions, self.dimension, self.dimension, generator=generator)
        target = torch.randn(self.functions, self.dimension, generator=generator)

        def losses(params: Params) -> Tensor:
            residual = torch.einsum("bij,pbj->pbi", weight.to(params["theta"].dtype), params["theta"]) - target
            return residual.square().sum(-1).mean(-1)

        return Optimizee({"theta": torch.zeros(1, self.functions, self.dimension)}, losses, generator)


class Quartic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="quartic"):
    """A small non-convex toy: ``f(x) = sum_i (z+1)(z+0.5)z(z-1)`` with ``z = w * (x - 1)``, summed over the dimension.

    Every coordinate has two minima; the deeper one lies at z = 0.663.

    Args:
        dimension: Size of x.
        functions: Independent functions side by side (P).
    """

    dimension: Count = 10
    functions: Count = 128

    def sample(self, seed: int) -> Optimizee:
        """Return fresh functions, ``w ~ U(0.5, 1.5)``, ``x_0 ~ U(-1, 1)``.

        Args:
            seed: Decides w and the start.

        Returns:
            P = ``functions`` problems with parameter ``x`` ``(P, dimension)``.
        """
        generator = seeded(seed)
        width = 0.5 + torch.rand(self.functions, self.dimension, generator=generator)
        start = 2 * torch.rand(self.functions, self.dimension, generator=generator) - 1

        def losses(params: Params) -> Tensor:
            z = width.to(params["x"].dtype) * (params["x"] - 1)
            return ((z + 1) * (z + 0.5) * z * (z - 1)).sum(-1)

        return Optimizee({"x": start}, losses, generator)
