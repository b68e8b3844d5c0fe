"""Tasks: distributions of optimizees."""

from meta_train.tasks.mixture import Mixture
from meta_train.tasks.mnist import Mnist
from meta_train.tasks.neural_art import NeuralArt
from meta_train.tasks.quadratic import Quadratic, Quartic
from meta_train.tasks.task import Optimizee, Task, module_optimizee, seeded, with_data

TaskRecipe = Quadratic | Quartic | Mixture | NeuralArt | Mnist
"""The tasks a recipe can name."""

__all__ = [
    "Mixture",
    "Mnist",
    "NeuralArt",
    "Optimizee",
    "Quadratic",
    "Quartic",
    "Task",
    "TaskRecipe",
    "module_optimizee",
    "seeded",
    "with_data",
]
