"""On-policy distillation on text, by TRL: the LM corrects what a student's decoder says itself.

The decoder is exported as a plain LM, TRL's trainer lets it answer the prompts and pulls the
distribution of its answers towards the LM's (reverse KL), and the result is put back into the
student as `ldistill merge --weight 1` does. Needs `pip install 'ldistill[trl]'`. A line of the
prompts is {"prompt": "..."}; without a file they are questions of the tiny world. An answer has
--length tokens at most.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from ldistill.common.locate import resolve
from ldistill.tiny.corpus import replayed
from ldistill.tiny.world import World
from ldistill.tools.merge import merge
from ldistill.training.export import export_decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag in ("student", "lm", "out"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--prompts", help='lines of {"prompt": "..."}; default: the tiny world\'s')
    for flag, usual in {"steps": 100, "batch": 16, "length": 32, "rate": 1e-4, "seed": 1}.items():
        parser.add_argument(f"--{flag}", type=type(usual), default=usual)
    asked = parser.parse_args()
    if asked.prompts:
        texts = load_dataset("json", data_files=asked.prompts, split="train")["prompt"]
    else:
        texts = [turn.user for chat in replayed(World(), 4000) for turn in chat.turns]
    with tempfile.TemporaryDirectory() as made:
        decoder, trained = Path(made) / "decoder", Path(made) / "trained"
        export_decoder(resolve(asked.student), decoder)
        teacher = AutoModelForCausalLM.from_pretrained(resolve(asked.lm), dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(decoder, dtype="float32")
        # Both must speak of the same tokens; the student's own ones come back in the merge.
        model.resize_token_embeddings(teacher.config.vocab_size)
        settings = DistillationConfig(
            output_dir=made,
            beta=1.0,  # reverse KL, over answers that are the student's own
            max_completion_length=asked.length,
            max_steps=asked.steps,
            per_device_train_batch_size=asked.batch,
            learning_rate=asked.rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=asked.seed,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
        )
        tokenizer = AutoTokenizer.from_pretrained(decoder)
        models = {"model": model, "teacher_model": teacher, "processing_class": tokenizer}
        chats = [[{"role": "user", "content": text}] for text in texts]
        data = Dataset.from_dict({"prompt": chats})
        DistillationTrainer(**models, args=settings, train_dataset=data).train()
        model.save_pretrained(trained)
        merge(asked.student, str(trained), {"1": Path(asked.out)})


if __name__ == "__main__":
    main()
