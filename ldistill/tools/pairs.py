"""A pair by the name that a user gives: a named one, a recipe, or a student's folder.

Of the public ones the configuration is known: neither planning nor a benchmark needs the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldistill.common.errors import did_you_mean
from ldistill.common.locate import resolve
from ldistill.models.named_pairs import KNOWN_STUDENTS, folder_config, student_config
from ldistill.models.shapes import PairShape, shape_of
from ldistill.recipe import load_recipe, shipped_recipes

MAIN_RECIPE = "lingudistill"  # for a student that no recipe names
_RECIPES = {"nanovlm-460m": MAIN_RECIPE}  # of pairs that are not called like their recipe
# Fields of a shape that a recipe sets.
_RUN = {"length": "max_length", "micro_batch": "per_device_train_batch_size"}
_RUN |= {"global_batch": "global_batch_size", "steps": "max_steps"}


def recipe_of(pair: str) -> str | None:
    """The recipe that trains a pair; None of a student's folder. Raises ValueError: none such."""
    name = KNOWN_STUDENTS.get(pair, pair)
    name = _RECIPES.get(name, name)
    if name in shipped_recipes() or name.endswith((".yaml", ".yml")):
        return name
    if Path(name).is_dir():
        return None
    known = [*_RECIPES, *shipped_recipes()]
    told = f"no pair {pair!r}.{did_you_mean(pair, known)} Give one of {', '.join(known)}, "
    raise ValueError(f"{told}a recipe's YAML file, or a student's folder.")


def student_of(name: str) -> str:
    """The student of a shipped recipe; any other name is a student's own."""
    return load_recipe(name)["student"] if name in shipped_recipes() else name


def pair_config(pair: str) -> Any:
    """Configuration of a pair's student.

    Raises ValueError: no such pair, or another kind; FileNotFoundError: it is not at hand.
    """
    recipe = recipe_of(pair)
    if recipe is None:
        return folder_config(Path(pair))
    student = load_recipe(recipe)["student"]
    if student in KNOWN_STUDENTS:
        return student_config(KNOWN_STUDENTS[student])
    return folder_config(resolve(student, weights=False))


def pair_shape(pair: str) -> PairShape:
    """Shape of a pair, with the rows and steps of its recipe. Raises as :func:`pair_config` does.

    The teacher of a student's folder is taken to be its own decoder over the base vocabulary.
    """
    recipe = recipe_of(pair)
    values = load_recipe(recipe) if recipe else {}
    run = {name: values[field] for name, field in _RUN.items() if values.get(field)}
    return shape_of(KNOWN_STUDENTS.get(pair, pair), pair_config(pair), run)
