"""Tasks: distributions of optimizees."""

from meta_train.tasks.mixture import Mixture
from meta_train.tasks.quadratic import Quadratic, Quartic
from meta_train.tasks.task import Optimizee, Task, module_optimizee, seeded

TaskRecipe = Quadratic | Quartic | Mixture
"""The tasks a recipe can name."""

__all__ = ["Mixture", "Optimizee", "Quadratic", "Quartic", "Task", "TaskRecipe", "module_optimizee", "seeded"]
