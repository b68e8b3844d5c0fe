"""The README of a Hub repository, made from what a weight file says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from learned_optim.weights.facts import ADAM_BYTES, bytes_per_parameter, training_facts
from learned_optim.weights.file_format import Described
from learned_optim.weights.text import markdown, visible

_LICENCE = {"mit": "MIT.", "unknown": "Not stated; ask its maker before you share or build on it."}


def model_card(weights: Described, repo_id: str, license: str, results: str = "") -> str:
    """Write a model card. Text from the weights is escaped: it is shown, and never acts as Markdown or HTML.

    Args:
        weights: The weights that the card describes.
        repo_id: The repository of the card.
        license: SPDX identifier in lower case, or ``"unknown"``.
        results: Markdown, the measured results; without it the card says that there are none.

    Returns:
        Markdown with a YAML head.
    """
    rule = weights.rule
    size = sum(parameter.numel() for parameter in rule.parameters())
    moments, memory = len(rule.moment_names), 2 * rule.memory_width
    training = training_facts(weights.recipe, weights.metadata.get("task", ""))
    recipe = "\n".join(visible(line) for line in weights.recipe.strip().splitlines()) or "# Not recorded."
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", recipe))])
    return f"""---
library_name: learned-optim
license: {license if re.fullmatch("[a-z0-9.-]+", license) else "other"}
tags:
- learned-optimizer
- optimizer
- meta-learning
- pytorch
---

# {markdown(weights.title)}: a learned update rule

An optimizer for PyTorch whose update rule was itself learned: a coordinatewise LSTM with {size:,} meta-parameters, of the
family `{rule.family}`.

```
pip install .   # in a clone of learned-optim
```

```python
from learned_optim import LearnedOptimizer

optimizer = LearnedOptimizer(model.parameters(), weights="{repo_id}")
```

The rule at `{repo_id}` may change. To get the same one always, and without a network once it is cached, pin a commit:
`weights="{repo_id}@<40 hexadecimal digits>"`.

It keeps {moments} moments and {memory} LSTM numbers for each parameter of your model: {bytes_per_parameter(rule)} bytes, or
{bytes_per_parameter(rule, torch.bfloat16)} with `state_dtype=torch.bfloat16`, {bytes_per_parameter(rule, torch.int8)} with
`state_dtype=torch.int8` (Adam keeps {ADAM_BYTES}). It works best on problems like those it was meta-trained on, and for
about as many steps; measure before you rely on it elsewhere.

## Meta-training

{_table(training) if training else "See the recipe below."}

## Results

{results.strip() or "None were published with these weights."}

## Rule

{_table({"family": rule.family, **rule.config.to_dict()})}

## Provenance

{_table({**dict(sorted(weights.metadata.items())), "fingerprint": weights.fingerprint})}

## Licence

{_LICENCE.get(license, markdown(license))}

## Recipe

{fence}toml
{recipe}
{fence}
"""


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {markdown(name)} | {markdown(value)} |" for name, value in rows.items())])
