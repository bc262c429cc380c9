"""What the data tests share: a small tokenizer with a chat template, pictures, samples, shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ldistill.common.images import ImageSettings
from ldistill.common.samples import Sample, Turn
from ldistill.data.archive import SAMPLE_DTYPE
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_format import ImageTokens, NanoVLMProcessor

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "What is the total amount on the receipt? The total is 42.50 euros.",
    "Which company issued this invoice, and on what date was it issued?",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
    "user\nassistant\nsystem\nThe quick brown fox jumps over the lazy dog.\n\n",
]


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    template: str = CHATML, with_image_tokens: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with ChatML marks and nanoVLM's image tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
    )
    if with_image_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": ImageTokens().all()})
    tokenizer.chat_template = template
    return tokenizer


def make_processor(**settings: object) -> NanoVLMProcessor:
    """A processor with 32-pixel tiles of 4 tokens, unless `settings` say otherwise."""
    small = {"tile_size": 32, "tokens_per_tile": 4, "max_side": 128}
    return NanoVLMProcessor(make_tokenizer(), ImageSettings(**{**small, **settings}))


def picture(width: int = 40, height: int = 30, kind: str = "PNG", seed: int = 0) -> bytes:
    """An encoded picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_samples(source: str, count: int, images: int = 1, seed: int = 0) -> list[Sample]:
    """Samples with pictures and answers of various lengths."""
    rng = np.random.default_rng([seed, len(source), count])
    samples = []
    for number in range(count):
        answer = " ".join(rng.choice(list("abcdefghij"), size=int(rng.integers(1, 30))))
        turns = (Turn(f"What is {number}?", answer), Turn("And on what date?", str(number)))
        kinds = ["JPEG", "PNG"]
        files = tuple(picture(40, 30, kinds[i % 2], number * 7 + i) for i in range(images))
        samples.append(Sample(f"{source}-{number}", source, turns[: 1 + number % 2], files))
    return samples


def make_student(folder: Path) -> Path:
    """A folder with what a build needs of a student: its config.json and a tokenizer."""
    tokenizer = make_tokenizer(with_image_tokens=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = NanoVLMConfig(
        vit_img_size=32,
        vit_patch_size=8,
        mp_pixel_shuffle_factor=2,
        mp_image_token_length=4,
        max_img_size=128,
        lm_base_vocab_size=len(tokenizer),
        lm_vocab_size=len(tokenizer) + 66,
        lm_tokenizer=str(folder / "tokenizer"),
    )
    (folder / "config.json").write_text(config.to_json())
    return folder


def die(row: int, value: object) -> list:
    """A converter that takes its worker with it."""
    os._exit(3)


def table5_lengths(documents: int, image_tokens: int = 64, seed: int = 0) -> np.ndarray:
    """Document lengths with the median, P95 and maximum of each source in the paper's Table 5."""
    rng = np.random.default_rng(seed)
    parts = []
    for median, p95, longest in TABLE5:
        # Log-normal through median and P95: its tail is long, as the table's is.
        text = median * np.exp(np.log(p95 / median) / 1.645 * rng.standard_normal(documents // 17))
        parts.append(np.clip(text, 8, longest))
    return np.concatenate(parts).astype(np.int64) + image_tokens


TABLE5 = (
    (60, 100, 116),
    (187, 307, 321),
    (35, 56, 664),
    (102, 425, 1974),
    (118, 549, 15171),
    (197, 705, 972),
    (58, 192, 673),
    (26, 80, 98),
    (88, 225, 329),
    (35, 92, 134),
    (90, 265, 357),
    (97, 234, 310),
    (102, 124, 162),
    (21, 30, 35),
    (34, 48, 56),
    (126, 182, 217),
    (70, 241, 292),
)


def write_fake_index(root: Path, source: str, lengths: np.ndarray, shard_samples: int) -> None:
    """An index of samples that are nowhere: enough to plan with."""
    folder = root / source
    folder.mkdir(parents=True)
    samples = np.zeros(len(lengths), dtype=SAMPLE_DTYPE)
    samples["tokens"], samples["prompt"] = lengths, lengths - 8
    samples["row"] = np.arange(len(lengths))
    samples["shard"] = samples["row"] // shard_samples
    counts = np.bincount(samples["shard"]).tolist()
    np.save(folder / "samples.npy", samples)
    shards = [
        {"url": f"{source}-train-{n:06d}.tar", "samples": c, "bytes": 1, "sha256": ""}
        for n, c in enumerate(counts)
    ]
    meta = {"format": 1, "source": source, "category": "language", "shards": shards}
    meta |= {"processor": "", "processor_parts": {}, "image_settings": {}}
    (folder / "index.json").write_text(json.dumps(meta))


def assert_same_batches(batches: Iterable[dict], others: Iterable[dict]) -> None:
    """The same batches in the same order, to the bit."""
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def digests(root):
    """Relative path -> hash of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /should/never/be/there",)
