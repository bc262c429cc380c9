"""`ldistill merge`: a student whose decoder lies between its own and the language model's.

    ldistill merge --student runs/x/student --lm LM --weights 0.1,0.3 --out merged/

Weight 0 gives the student's bytes, weight 1 the LM's decoder. The image tokens that were added to
the vocabulary stay the student's, as do vision tower and projector. Any family that trains merges.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def merge(
    student: str,
    lm: str,
    out: Path,
    weight: float,
    *,
    growing: bool = False,
    layers: str | None = None,
) -> None:
    """Write the student with `(1 - weight) * its own + weight * the LM's` in its decoder.

    Args:
        student: folder or hub id.
        lm: the LM it was built on: folder or hub id.
        out: new folder.
        weight: from 0 to 1.
        growing: from 0 at the embedding to `weight` at the head, in proportion to depth.
        layers: only these: ``FIRST-LAST``, from 0; None: all, with embedding, norm and head.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: the two do not fit, a weight beyond 0 to 1, or layers that are no range.
    """
    import torch

    from ldistill.models.pair import load_pair

    if not 0 <= weight <= 1 or not re.fullmatch(r"\d+-\d+", layers or "0-0"):
        raise ValueError(
            f"a weight is from 0 to 1, got {weight}; layers are FIRST-LAST, got {layers}."
        )
    pair = load_pair(student, lm)
    model = pair.student
    names = {id(p): name for name, p in model.causal_lm().named_parameters()}
    theirs, count = pair.teacher.lm.state_dict(), model.backbone.config.num_hidden_layers
    first, last = map(int, layers.split("-")) if layers else (-1, count)
    updates = {}
    for name, mine in model.named_parameters(remove_duplicate=False):
        if id(mine) not in names:
            continue
        layer = _layer(names[id(mine)], count)
        share = weight * (layer + 1) / (count + 1) if growing else weight
        if share and first <= layer <= last:
            other = theirs[names[id(mine)]].to(mine)
            updates[name] = mine.detach().clone()
            updates[name][: len(other)] = torch.lerp(mine.detach()[: len(other)], other, share)
    pair.export(updates, out)


def _layer(name: str, count: int) -> int:
    """Number of a parameter's layer; before the first: -1, behind the last: `count`."""
    if found := re.search(r"layers\.(\d+)\.", name):
        return int(found[1])
    return -1 if "embed" in name else count


def merge_command(
    student: Annotated[str, typer.Option(help="Student folder or hub id.")],
    lm: Annotated[str, typer.Option(help="The LM it was built on: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New folder; with --weights a folder of folders.")],
    weight: Annotated[float | None, typer.Option(help="The LM's share, 0 to 1.")] = None,
    weights: Annotated[str | None, typer.Option(help="Several, separated by commas.")] = None,
    growing: Annotated[
        bool, typer.Option("--growing", help="From 0 at the embedding to the weight at the head.")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="Only layers FIRST-LAST, from 0.")] = None,
) -> None:
    """Average a student's decoder with the language model it was built on."""
    if (weight is None) == (weights is None):
        raise ValueError("give --weight or --weights.")
    sweep = {out: weight} if weights is None else {}
    for text in (weights or "").split(",") if weights else ():
        sweep[out / f"weight-{text.strip()}"] = float(text)
    for folder, share in sweep.items():
        if folder.exists():
            raise ValueError(f"{folder} exists: choose another --out or remove it.")
        merge(student, lm, folder, share, growing=growing, layers=layers)
        typer.echo(f"weight {share}  {folder}")
