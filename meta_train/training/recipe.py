"""A recipe: the complete, typed description of one meta-training run, kept as TOML beside the weights it makes."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from learned_optim.rules import UpdateRule, build_rule, plain_adam
from learned_optim.weights import resolve_weights
from meta_train.files import read_text
from meta_train.tasks import OwnTask, TaskRecipe
from meta_train.tasks.held_out import HeldOut
from meta_train.tasks.task import Count, NotNegative, Positive
from meta_train.training.base import start_weights, with_base
from meta_train.training.parts import Parts, part_of
from meta_train.training.recipe_tasks import with_task_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Horizons = Count | Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Objective = Literal["mean", "log", "relative", "last"]
Several = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
"""A number of things that are kept in memory together."""

Rate = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
"""A factor of meta-parameters: its square is finite in float32 too."""

PartName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][\w.]*$")]


class InnerLoop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an episode runs.

    Args:
        horizon: Shortest and longest episode in inner steps; each episode draws its own, log-uniformly.
        truncation: Inner steps backpropagated through at once, K.
    """

    horizon: tuple[Count, Count]
    truncation: Count = 20


class Evolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Estimate the meta-gradient by evolution strategies on whole episodes instead of by backpropagation.

    Each outer step moves the meta-parameters both ways along random directions and runs one episode for each way. The
    estimate is exact up to the square of the noise and sees all the way to the horizon, but it takes many pairs.

    Args:
        noise: Standard deviation of a move, for each meta-parameter.
        pairs: Episodes in an outer step; each is run twice, with the same minibatches.
        only: Move only meta-parameters whose names contain this; every further one makes the estimate worse.

    References:
        Antithetic pairs: Salimans et al. 2017, arXiv:1703.03864.
    """

    noise: Rate
    pairs: Several = 4
    only: str = ""


class OuterLoop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How meta-parameters are trained.

    Args:
        steps: Outer steps; each takes one truncation of every concurrent episode.
        lr: Rate of the outer optimizer (AdamW) at the start.
        final_lr: Share of ``lr`` left at the end of a cosine decay.
        clip: Largest norm of the meta-gradient.
        episodes: Concurrent episodes.
        objective: Weights of the losses. ``"mean"``: all equal. ``"log"``: the mean of their logarithms. ``"relative"``:
            losses relative to their mean over the truncation. ``"last"``: the same, of its last tenth alone.
        coordinates: Coordinates of each episode to backpropagate through; 0 for all.
        sampling: Which coordinates: all with equal chances (``"uniform"``), or an equal number from each tensor, as far as
            it has them (``"tensors"``).
        discount: Factor per inner step in the meta-gradient; 1 is exact.
        loss_floor: Losses below this share of the initial loss weigh no more than that share (log and relative objectives).
        averaging: Decay of the running average of the meta-parameters that is validated and published; 0: no average.
        weight_decay: Decoupled weight decay of the meta-parameters, per outer step and unit of ``lr``.
        second_derivatives: Keep second derivatives, at many times the cost.
        forget_bias: Added at the start to the biases of the forget gates, so an untrained LSTM already remembers: with 3 a
            memory lives for about 20 inner steps, with 0 for two.
        readout: Factor of the readout's weights at the start. Random updates of full size teach some seeds to stand still.
        evolution: Estimate the meta-gradient in this way; options of truncations and coordinates then have no effect.
    """

    steps: Count
    lr: Rate
    final_lr: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.02
    clip: Positive = 1.0
    episodes: Several = 1
    objective: Objective = "mean"
    coordinates: Annotated[int, msgspec.Meta(ge=0)] = 0
    sampling: Literal["uniform", "tensors"] = "uniform"
    discount: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    loss_floor: NotNegative = 0.0
    averaging: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    second_derivatives: bool = False
    forget_bias: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)] = 0.0
    readout: Rate = 1.0
    evolution: Evolution | None = None


class Validation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the best meta-parameters are chosen.

    Args:
        every: Outer steps between validations.
        optimizees: Number of fixed optimizees, with seeds never used elsewhere.
        horizon: Inner steps. Optimizees take several horizons in turn, so long ones count at a part of their cost.
        task: Draw the optimizees from here; the default is the task of the training.
        use: Options of the rule that differ from the recipe's ``use`` while it is validated: a clock that suits long
            training may not suit this horizon.
        final_horizon: As ``horizon``, for episodes too long for every validation: the best so far runs them when a phase
            ends. The run keeps the best by these; without any, the best by ``horizon``.
    """

    every: Count
    optimizees: Several
    horizon: Horizons
    task: TaskRecipe | HeldOut | None = None
    use: dict[str, Any] = {}
    final_horizon: Horizons | None = None


class Imitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a rule starts: it learns to make a teacher's updates, on the teacher's course, before it learns to beat them.

    On a plateau that random updates do not leave, a truncated meta-gradient only makes the updates smaller, for hundreds
    of outer steps. Coordinates are sampled by tensor, so that every tensor counts equally.

    Args:
        teacher: A bundled name, or the rate of an Adam.
        steps: Outer steps.
        lr: As in :class:`OuterLoop`.
    """

    teacher: str | Rate
    steps: Count
    lr: Rate

    def build_teacher(self) -> UpdateRule:
        """Return the teacher's rule.

        Returns:
            The bundled one, or :func:`~learned_optim.rules.plain_adam`.

        Raises:
            WeightsNotFoundError: If no bundled weights have that name.
        """
        if isinstance(self.teacher, str):
            return resolve_weights(self.teacher).rule
        return plain_adam(self.teacher)


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Further outer steps, after the steps of :class:`OuterLoop`, from the best meta-parameters so far.

    A long truncation, or exact second derivatives, lead nowhere from an untrained rule and far from one that already
    optimizes. A stage starts the outer optimizer, its rate's decay and the episodes anew; options it does not name stay.

    Args:
        steps: Outer steps.
        lr: As in :class:`OuterLoop`.
        horizon: As in :class:`InnerLoop`.
        truncation: As in :class:`InnerLoop`.
        clip: As in :class:`OuterLoop`.
        objective: As in :class:`OuterLoop`; validation still uses the objective there.
        sampling: As in :class:`OuterLoop`.
        averaging: As in :class:`OuterLoop`.
        second_derivatives: As in :class:`OuterLoop`.
        evolution: As in :class:`OuterLoop`.
    """

    steps: Count
    lr: Rate
    horizon: tuple[Count, Count] | None = None
    truncation: Count | None = None
    clip: Positive | None = None
    objective: Objective | None = None
    sampling: Literal["uniform", "tensors"] | None = None
    averaging: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    second_derivatives: bool | None = None
    evolution: Evolution | None = None


class Phase(NamedTuple):
    """A part of a run with one way to train."""

    inner: InnerLoop
    outer: OuterLoop
    imitates: bool = False


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One meta-training run.

    Args:
        rule: ``family`` and the fields of its configuration; or ``base``, bundled weights whose recipe gives all of
            these, ``use`` and ``start``, and the fields that differ.
        task: Where optimizees come from: ``name`` and its options. A task of your own is ``"package.module:Class"``.
        inner: How an episode runs.
        outer: How meta-parameters are trained.
        validation: How the best meta-parameters are chosen.
        start: Bundled weights of the same shape that this run starts from, as ``"default"`` or pinned as
            ``"default@<fingerprint>"``; without it, meta-parameters are drawn. A run pins it, and ``base``, when it begins.
        imitation: A first phase that imitates a teacher, if any.
        stages: Further phases, one after another.
        use: Options of the rule that differ from meta-training in use: rules are validated, kept and published with them.
            None may change the shape of the meta-parameters. A truncated meta-gradient sees no gain beyond its truncation,
            so rules are meta-trained to hurry; a clock (``time_scales``) that runs slower in use makes up for it.
        parts: Prefixes of parameter names. Each has a rule with meta-parameters of its own, which moves the parameters with
            that prefix. Empty: one rule moves everything.
        seed: Decides everything random.
        schema: Version of this format.
    """

    rule: dict[str, Any]
    task: TaskRecipe
    inner: InnerLoop
    outer: OuterLoop
    validation: Validation
    start: str | None = None
    imitation: Imitation | None = None
    stages: tuple[Stage, ...] = ()
    use: dict[str, Any] = {}
    parts: tuple[PartName, ...] = ()
    seed: int = 0
    schema: Literal[1] = 1

    @property
    def phases(self) -> tuple[Phase, ...]:
        """How each part of the run trains: imitation, if any; then ``inner`` and ``outer``; then each stage."""
        phases = [Phase(self.inner, self.outer)]
        if self.imitation:
            steps, lr = self.imitation.steps, self.imitation.lr
            outer = msgspec.structs.replace(self.outer, steps=steps, lr=lr, sampling="tensors", evolution=None)
            phases.insert(0, Phase(self.inner, outer, imitates=True))
        for stage in self.stages:
            inner, outer, _ = phases[-1]
            named = {name: value for name, value in msgspec.structs.asdict(stage).items() if value is not None}
            of_inner = {name: named.pop(name) for name in ("horizon", "truncation") if name in named}
            inner = msgspec.structs.replace(inner, **of_inner)
            phases.append(Phase(inner, msgspec.structs.replace(outer, **named)))
        return tuple(phases)

    @property
    def steps(self) -> int:
        """Outer steps of the whole run."""
        return sum(phase.outer.steps for phase in self.phases)

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """Import paths of the user's own tasks that have not been imported."""
        tasks = (self.task, self.validation.task)
        return tuple(dict.fromkeys(task.path for task in tasks if isinstance(task, OwnTask)))

    def importing(self, paths: Collection[str]) -> Recipe:
        """Return the recipe with the user's own tasks imported; give only paths that the user named or wrote.

        Args:
            paths: Some of :attr:`own_tasks`. Tasks with other paths stay as they are, and cannot be sampled.

        Returns:
            The recipe.
        """

        def imported(task: Any) -> Any:
            return task.imported() if isinstance(task, OwnTask) and task.path in paths else task

        validation = msgspec.structs.replace(self.validation, task=imported(self.validation.task))
        return msgspec.structs.replace(self, task=imported(self.task), validation=validation)

    def build_rule(self, **options: Any) -> Parts:
        """Build the untrained rules of all parts, or of the whole model; the caller seeds torch's generator.

        Args:
            **options: Replace options of meta-training, for example by ``use``.

        Returns:
            The rules; without parts in the recipe there is one rule, for the part ``""``.

        Raises:
            ValueError: If the rule's family or an option is unknown, or a value has no meaning.
        """
        options = {**self.rule, **options}
        if "family" not in options:
            raise ValueError('the recipe\'s [rule] names no family; write, for example, family = "paper"')
        family = options.pop("family")
        try:
            return Parts({part: build_rule(family, **options) for part in self.parts or ("",)})
        except TypeError as error:
            raise ValueError(f"[rule] has a value of a type that its option does not take: {error}, in {options}") from error


def parse_recipe(text: str) -> Recipe:
    """Parse a recipe; a misspelt key is an error.

    Args:
        text: TOML.

    Returns:
        The recipe.

    Raises:
        ValueError: If the text is not TOML, or a key or value does not fit; the message names the place.
    """
    recipe = _converted(text)
    trained = recipe.build_rule().shared.state_dict()
    for options in (recipe.use, recipe.use | recipe.validation.use):
        used = recipe.build_rule(**options).shared.state_dict()
        if {name: value.shape for name, value in trained.items()} != {name: value.shape for name, value in used.items()}:
            raise ValueError(f"use must not change the shape of the meta-parameters, got {options}")
    for part in recipe.parts:
        part_of(recipe.parts, part)
    if recipe.start:
        _check_start(recipe, recipe.start)
    if recipe.imitation:
        recipe.imitation.build_teacher()
    for evolution in (phase.outer.evolution for phase in recipe.phases):
        if evolution and not any(evolution.only in name for name in trained):
            raise ValueError(f"no meta-parameter's name contains {evolution.only!r}; there are {', '.join(trained)}")
    for shortest, longest in (phase.inner.horizon for phase in recipe.phases):
        if shortest > longest:
            raise ValueError(f"a horizon must be [shortest, longest], got {[shortest, longest]}")
    return recipe


def _converted(text: str) -> Recipe:
    try:
        values = tomllib.loads(text)
        _check_finite(values, "$")
        return msgspec.convert(with_task_names(with_base(values)), Recipe)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the recipe is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"the recipe does not fit: {error}") from error
    except RecursionError as error:
        raise ValueError("the recipe is nested too deep; no recipe needs more than a few levels") from error
    except ValueError as error:
        if "digits" in str(error):  # Python's own limit; its message is for programmers.
            raise ValueError("the recipe does not fit: a number in it has thousands of digits") from error
        raise


def _check_finite(value: Any, place: str) -> None:
    """Refuse NaN and Inf: TOML can write them, and bounds let them through."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the recipe does not fit: every number must be finite, got {value} - at `{place}`")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        _check_finite(one, f"{place}.{key}" if isinstance(value, dict) else f"{place}[{key}]")


def _check_start(recipe: Recipe, start: str) -> None:
    source, rule = start_weights(start).rule, recipe.build_rule().shared
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (source, rule)]
    if source.family != rule.family or shapes[0] != shapes[1]:
        raise ValueError(
            f"start must be weights of the same family and shape as [rule]; {start!r} is {source.family}, {source.config}, "
            f"and [rule] is {rule.family}, {rule.config}"
        )


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Args:
        path: A ``.toml`` file.

    Returns:
        The recipe.

    Raises:
        ValueError: If the file does not parse; the message names the file.
    """
    text = read_text(Path(path))
    try:
        return parse_recipe(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
