"""Pages made of the code when the site is built: recipes and flags, the kernels' README."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config) -> Files:
    """Add the generated pages and the pictures of the kernels' README."""
    files.append(File.generated(config, "recipes.md", content=recipes_page()))
    files.append(File.generated(config, "kernels.md", content=kernels_page()))
    for picture in (ROOT / "kernels").glob("*.svg"):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_post_page(output: str, page, config) -> str:
    """Leave out the notebook template's script for diagrams, which a reader would have to fetch."""
    return re.sub(
        r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', "", output, flags=re.S
    )


def recipes_page() -> str:
    """Every shipped recipe and every flag, from the YAML files and the dataclasses."""
    from ldistill.recipe import OWN, recipe_differences, shipped_recipes

    parts = [
        "# Recipes and flags\n",
        "A recipe is a short YAML file of the fields below; `--recipe` takes a shipped one or a "
        "path. Values come, each overriding the one before, from the defaults, "
        "`recipes/_shared.yaml`, the recipe and the command line. Every flag of transformers' "
        "`TrainingArguments` works too, or is refused with a sentence.\n",
        "## Shipped recipes\n",
        "| recipe | what it is | sets |\n|---|---|---|",
    ]
    for name, path in shipped_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        sets = "<br>".join(f"`{k}: {v}`" for k, v in recipe_differences(name).items())
        parts.append(f"| `{name}` | {comment} | {sets} |")
    shared = (ROOT / "ldistill" / "recipes" / "_shared.yaml").read_text(encoding="utf-8")
    parts.append(f"\n## What they share\n\n```yaml\n{shared}```\n")
    for group in OWN:
        parts.append(f"## {group.__doc__.strip().splitlines()[0].rstrip('.')}\n")
        parts.append("| flag | default | meaning |\n|---|---|---|")
        parts += [_flag(field, typing.get_type_hints(group)) for field in dataclasses.fields(group)]
        parts.append("")
    return "\n".join(parts)


def _flag(field: dataclasses.Field, types: dict[str, object]) -> str:
    default = "" if field.default in (None, dataclasses.MISSING) else f"`{field.default}`"
    meaning = field.metadata["help"].replace("|", "\\|")
    choices = typing.get_args(types[field.name]) if "Literal" in str(types[field.name]) else ()
    if choices and all(isinstance(choice, str) for choice in choices):
        named = ", ".join(f"`{choice}`" for choice in choices)
        meaning = f"{meaning} One of {named}." if "\\|" not in meaning else meaning
    return f"| `--{field.name}` | {default} | {meaning} |"


def kernels_page() -> str:
    """The kernels' README, whose links to files of the repository stay words."""
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)
