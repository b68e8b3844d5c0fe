"""The README of a Hub repository, made from what a weight file says of itself."""

from __future__ import annotations

from learned_optim.weights.weights import Weights


def model_card(weights: Weights, repo_id: str) -> str:
    """Write a model card.

    Args:
        weights: What it describes.
        repo_id: Where it will stand.

    Returns:
        Markdown with a YAML head.
    """
    rule = weights.rule
    size = sum(parameter.numel() for parameter in rule.parameters())
    numbers = 2 * rule.memory_width
    options = "\n".join(f"| {name} | {value} |" for name, value in rule.config.to_dict().items())
    provenance = "\n".join(f"| {name} | {value} |" for name, value in sorted(weights.metadata.items())) or "| - | - |"
    recipe = weights.recipe.strip() or "# unknown"
    return f"""---
library_name: learned-optim
license: mit
tags:
- learned-optimizer
- optimizer
- meta-learning
- pytorch
---

# {weights.name}: a learned update rule

A per-coordinate LSTM that replaces a hand-designed optimizer; {size:,} meta-parameters, family `{rule.family}`.

```python
from learned_optim import LearnedOptimizer

opt = LearnedOptimizer(model.parameters(), weights="{repo_id}")  # pin it: "{repo_id}@<commit hash>"
```

It keeps {len(rule.moment_names)} moments and {numbers} LSTM numbers for each parameter:
{4 * (len(rule.moment_names) + numbers)} bytes in float32,
{4 * len(rule.moment_names) + 2 * numbers} with `state_dtype=torch.bfloat16`.

Use it for problems like those it was meta-trained on (the recipe below); beyond them, and beyond the horizon in the
recipe, measure before you rely on it.

| configuration | |
|---|---|
{options}

| provenance | |
|---|---|
{provenance}
| fingerprint | {weights.fingerprint} |

## Recipe

```toml
{recipe}
```
"""
