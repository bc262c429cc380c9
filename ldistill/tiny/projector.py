"""A starting point for the projector: an image token begins as the words for what lies there.

Ridge regression from the vision tower's patches to the language model's own embeddings, so that
alignment starts from something the frozen model has a word for. Blank places become line breaks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldistill.students.nanovlm import NanoVLM
from ldistill.tiny.scenes import SOURCES
from ldistill.tiny.sight import KINDS, slot_labels
from ldistill.tiny.training import pixels
from ldistill.tiny.world import World, stream

PICTURES = 1700
RIDGE = 1e-2


@torch.no_grad()
def start_projector(
    student: NanoVLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    pictures: int = PICTURES,
) -> None:
    """Set the student's projector by regression; its vision tower must have learnt to see."""
    canvases = [
        SOURCES[tuple(SOURCES)[i % len(SOURCES)]](
            world, stream(world.seed, "start", i), True
        ).canvas
        for i in range(pictures)
    ]
    seen: list[Tensor] = []
    hook = student.projector.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for start in range(0, pictures, 100):
        images = [canvas.image for canvas in canvases[start : start + 100]]
        student.projector(student.vision(pixels(images)).last_hidden_state)
    hook.remove()
    features = torch.cat(seen).flatten(0, 1).double()
    words = _class_embeddings(student, tokenizer)
    labels = torch.stack([slot_labels(canvas.placed) for canvas in canvases])
    wanted = _wanted(labels.transpose(1, 2).flatten(0, 1), words).double()
    penalty = RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(features.T @ features + penalty, features.T @ wanted)
    student.projector.proj.weight.copy_(solved.T.float())


def _class_embeddings(student: NanoVLM, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Embedding of every class of every kind, each [classes, hidden]; nothing is a line break."""
    table = student.decoder.get_input_embeddings().weight
    return [
        torch.stack([table[tokenizer(word or "\n")["input_ids"]].mean(0) for word in kind])
        for kind in KINDS
    ]


def _wanted(labels: Tensor, words: list[Tensor]) -> Tensor:
    """Target embeddings of slots [slots, kinds]: the sum over what is there."""
    present = labels > 0
    total = sum(words[k][labels[:, k]] * present[:, k, None] for k in range(len(words)))
    return torch.where(present.any(1, keepdim=True), total, words[0][:1])
