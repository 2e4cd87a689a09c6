"""Training of bare backbones on energies and forces; symmetrisation comes afterwards and needs no training."""

from symmetrize.training.config import (
    BackboneRecipe,
    DataRecipe,
    LossRecipe,
    OptimizerRecipe,
    Recipe,
    RecipeError,
    ScheduleRecipe,
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
    "TrainingResult",
    "evaluate",
    "load_recipe",
    "train",
]
