"""Training of backbones on energies and forces: bare, to be symmetrised afterwards, or through the symmetrisation."""

from symmetrize.training.config import (
    BackboneRecipe,
    DataRecipe,
    LossRecipe,
    OptimizerRecipe,
    Recipe,
    RecipeError,
    ScheduleRecipe,
    SymmetrizeRecipe,
    load_recipe,
)
from symmetrize.training.gradients import Errors, evaluate
from symmetrize.training.run import TrainingResult, train

__all__ = [
    "BackboneRecipe",
    "DataRecipe",
    "Errors",
    "LossRecipe",
    "OptimizerRecipe",
    "Recipe",
    "RecipeError",
    "ScheduleRecipe",
    "SymmetrizeRecipe",
    "TrainingResult",
    "evaluate",
    "load_recipe",
    "train",
]
