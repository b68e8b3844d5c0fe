"""Tasks: distributions of optimizees."""

from meta_train.tasks.cifar import Cifar
from meta_train.tasks.mixture import Mixture
from meta_train.tasks.mnist import Mnist
from meta_train.tasks.neural_art import NeuralArt
from meta_train.tasks.own import ImportedTask, OwnTask
from meta_train.tasks.quadratic import Quadratic, Quartic
from meta_train.tasks.task import Optimizee, Task, derive_seed, module_optimizee, seeded, with_data

TaskRecipe = Quadratic | Quartic | Mixture | NeuralArt | Mnist | Cifar | OwnTask
"""The tasks a recipe can name."""

__all__ = [
    "Cifar",
    "ImportedTask",
    "Mixture",
    "Mnist",
    "NeuralArt",
    "Optimizee",
    "OwnTask",
    "Quadratic",
    "Quartic",
    "Task",
    "TaskRecipe",
    "derive_seed",
    "module_optimizee",
    "seeded",
    "with_data",
]
