"""Two ranks train small students of many families, one of them on text alone.

Started by ``test_families_zero.py`` as a program, once per ZeRO stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from PIL import Image

from ldistill.common.samples import Turn
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.models.pair import Pair, load_pair
from ldistill.models.parts import train_only
from ldistill.models.weights import gather_trained
from ldistill.sources import SourceWeights

WEIGHTS = SourceWeights(("a",), ("language",), (0.5,), (2.0,))
STEPS, RATE = 3, 0.01


def open_pair(folder: Path) -> Pair:
    pair = load_pair(str(folder / "student"), str(folder / "teacher"))
    train_only(pair.student)
    return pair


def batch_of(pair: Pair, rank: int) -> dict:
    """Rank 0 has a picture, rank 1 has none."""
    images = [Image.linear_gradient("L").resize((70, 40)).convert("RGB")][rank:]
    turns, sizes = [Turn("What is this?", "A dog and a fox.")], [image.size for image in images]
    document, pictures = pair.processor.encode(turns, sizes), pair.processor.pictures(images)
    rotary = pair.processor.rotary(document.input_ids, pictures)
    loaded = LoadedDocument(rank, 0, document, pictures, rotary)
    batch = Collate(pair.processor.pad_token_id)([LoadedPack([loaded])])
    return {name: value for name, value in batch.items() if name != "drops"}


def main(stage: int, world: Path) -> None:
    """For every family in ``world``: a few steps; rank 0 writes what the weights became."""
    deepspeed.init_distributed("gloo")
    for folder in sorted(path.parent for path in world.glob("*/student")):
        pair = open_pair(folder)
        teacher = Teacher(pair.lm)
        if stage == 3:
            teacher.shard("zero3", torch.float32)
        trained = [p for p in pair.student.parameters() if p.requires_grad]
        distiller = Distiller(pair.student, teacher, WEIGHTS)
        engine, *_ = deepspeed.initialize(
            model=distiller.train(),
            optimizer=torch.optim.SGD(trained, lr=RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "gradient_clipping": 0.0,
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            },
        )
        batch = batch_of(pair, engine.global_rank)
        plan = distiller.supervise(batch)
        for _ in range(STEPS):
            engine.backward(engine(batch, plan, 10.0, True)["loss"])
            engine.step()
        weights = gather_trained(pair.student, keep=engine.global_rank == 0)
        if engine.global_rank == 0:
            torch.save(weights, folder / f"zero{stage}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
