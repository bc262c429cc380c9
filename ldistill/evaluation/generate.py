"""Talk to a student: pictures and a prompt in, text out, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ldistill.common.locate import resolve
from ldistill.models.formats import load_processor, load_student
from ldistill.training.export import find_student


def answer(
    student: str,
    prompt: str,
    images: Sequence[Path],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    tokenizer: str | None = None,
    tiling: bool = False,
) -> str:
    """A student's answer.

    Args:
        student: folder, hub id or run.
        prompt: the user's turn.
        images: pictures, before the prompt.
        max_new_tokens: at most so many tokens.
        temperature: 0 for greedy.
        tokenizer: default the one the student's configuration names.
        tiling: cut large pictures into tiles.

    Raises:
        FileNotFoundError: no such student or picture.
        ValueError: a picture that cannot be decoded.
    """
    for image in images:
        if not image.is_file():
            raise FileNotFoundError(f"picture {image} does not exist.")
    folder = resolve(student)
    if not (folder / "config.json").is_file():
        folder = find_student(folder)
    processor = load_processor(folder, tokenizer, tiling=tiling, max_images=max(len(images), 1))
    tiles, grids = [], []
    for image in images:
        tile, grid = processor.tiles(processor.load_image(image.read_bytes()))
        tiles.append(tile)
        grids.append(grid)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_student(folder).eval().to(device)
    ids = torch.as_tensor(processor.prompt([], prompt, grids), dtype=torch.long)[None]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    new = model.generate(
        ids.to(device),
        torch.cat(tiles).to(device) if tiles else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
        **({"do_sample": False} | sampling),
    )
    return processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
