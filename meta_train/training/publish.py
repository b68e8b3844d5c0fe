"""From a finished run to weights that others can use: a file with its recipe beside it, and the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from learned_optim.weights import Weights, read_weights, write_weights
from meta_train.files import read_text, write_atomically
from meta_train.provenance import read_environment
from meta_train.training.run_dir import BEST, COST, ENVIRONMENT, RECIPE, costs, of_part

WEIGHTS_DIR = Path(__file__).parents[2] / "learned_optim" / "weights"


def publish(
    run: str | Path, name: str, to: str | Path = WEIGHTS_DIR, *, license: str | None = None, title: str | None = None
) -> list[Path]:
    """Write the best weights of a run as ``name.safetensors`` beside their recipe ``name.toml``.

    Of a run whose recipe names ``parts``, each part's weights become ``name-PART.safetensors`` beside the one recipe.

    Args:
        run: A run directory.
        name: New name of the weights.
        to: Where to put them, a directory that is made if missing; by default among those bundled with the package.
        license: SPDX identifier of their licence; by default none is stated.
        title: How their card calls them; by default by their name.

    Returns:
        The weight files.

    Raises:
        ValueError: If the run has kept no weights, or the name is no plain file name.
    """
    run, to = Path(run), Path(to)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"{name!r} cannot name weights: use letters, digits, '-', '_' and '.', and no path (that is --to)")
    best = [run / BEST] if (run / BEST).exists() else sorted(run.glob(of_part(BEST, "*")))
    if not best:
        raise ValueError(f"{run} holds no {BEST}; train it first, or wait for its first checkpoint")
    recipe = read_text(run / RECIPE)
    environment = read_environment(run / ENVIRONMENT, "processor", "threads")
    kept = {"processor": environment["processor"], "threads": str(environment["threads"])}
    kept |= {name: f"{value:.4g}" for name, value in costs(run / COST).items()}
    targets = []
    to.mkdir(parents=True, exist_ok=True)
    for weights in map(read_weights, best):
        target = to / of_part(f"{name}.safetensors", weights.metadata.get("part", ""))
        published = Weights(weights.rule, target.stem, recipe, {**weights.metadata, **kept})
        write_weights(target, with_licence_and_title(published, license, title))
        targets.append(target)
    write_atomically(to / f"{name}.toml", recipe.encode())
    return targets


def with_licence_and_title(weights: Weights, license: str | None, title: str | None) -> Weights:
    """Return weights that state a licence and a title.

    Args:
        weights: Any.
        license: SPDX identifier; None leaves what they state.
        title: How their card calls them; None leaves it.

    Returns:
        The weights, with the same numerics.
    """
    metadata = {**weights.metadata, "license": license} if license else weights.metadata
    return Weights(weights.rule, title or weights.title, weights.recipe, metadata)
