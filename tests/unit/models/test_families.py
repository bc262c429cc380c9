"""Every family of the zoo against transformers itself: inputs, outputs, attention, adapters.

What all families promise of teacher, packing and export is `ldistill models --check`'s, and tested
with it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from ldistill.common.samples import BadImage, Turn
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.distill.attention import fitting_attention
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.models.formats import load_processor, load_student
from ldistill.models.hf_vlm import FAMILIES as KINDS
from ldistill.models.lora import add_lora, weight_updates
from ldistill.models.pair import load_pair
from ldistill.models.parts import train_only
from ldistill.models.weights import gather_trained
from ldistill.models.zoo import FAMILIES, write_pair
from ldistill.sources import SourceWeights
from ldistill.training.export import export_decoder

NAMES = [
    "llava", "llava-next", "llava-onevision", "smolvlm2", "idefics3", "internvl", "qwen2-vl",
    "qwen2.5-vl", "qwen3-vl", "gemma3", "paligemma", "mistral3", "glm4v", "glm46v", "ovis2",
    "aya-vision", "cohere2-vision", "kimi", "videollama3",
]  # fmt: skip
LABELS = SourceWeights(("a",), ("document",), (0.0,), (1.0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a family: its student's folder, written once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = write_pair(name, tmp_path_factory.mktemp(name, numbered=False))
        return made[name]

    return of


def pictures(count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 120, (count, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def theirs(folder: Path, images: list[Image.Image], tiling: bool) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a question about pictures."""
    processor = AutoProcessor.from_pretrained(folder)
    kind = FAMILIES[folder.parent.name].kind
    options = KINDS[kind].picture_options(kind, tiling) if images else {}
    if kind == "paligemma":  # it has no template, and writes what ours does by itself
        return processor(text="<image>" * len(images) + "Which one?", images=[images],
                         return_tensors="pt", **options)  # fmt: skip
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Which one?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    start = processor.tokenizer.bos_token
    special = not (start and text.startswith(start))
    return processor(text=text, images=images or None, return_tensors="pt",
                     add_special_tokens=special, **options)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_transformers(folder, name):
    """Ids, counted by sizes alone as shards are, and every tensor of the pictures."""
    kind = KINDS[FAMILIES[name].kind]
    for tiling in (False, True) if kind.tiling not in (None, "always") else (False,):
        ours = load_processor(folder(name), tiling=tiling, max_images=2)
        for count, seed in ((0, 0), (1, 1), (1, 2), (2, 3)):
            if name == "paligemma" and not count:
                continue
            images = pictures(count, seed)
            expected = theirs(folder(name), images, tiling)
            ids = ours.prompt((), "Which one?", [image.size for image in images])
            assert ids.tolist() == expected["input_ids"][0].tolist()
            for key, value in ours.pictures(images).items():
                torch.testing.assert_close(value, torch.as_tensor(expected[key]), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(folder, name):
    """Of a prompt: logits at its last position, and the answer."""
    student = load_student(folder(name)).eval()
    vlm = AutoModelForImageTextToText.from_pretrained(folder(name)).eval()
    images = pictures(2 if name != "paligemma" else 1, 5)
    given = {k: v for k, v in theirs(folder(name), images, False).items() if k != "labels"}
    processor = load_processor(folder(name), max_images=2)
    ids, seen = given["input_ids"], processor.pictures(images)
    rotary = processor.rotary(ids[0].numpy(), seen)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = student(ids, positions, seen, rotary=None if rotary is None else rotary[:, None])
        expected = vlm.base_model(**given, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 5, "eos_token_id": 2}
        new = student.generate(ids, seen, **options)
        whole = vlm.generate(**given, **options)
    assert torch.equal(new, whole[:, ids.shape[1] :])


def documents(folder: Path) -> tuple:
    pair = load_pair(str(folder), None, max_images=2)
    made = []
    for number, count in enumerate((1, 2, 0)):
        images, turns = (
            pictures(count, number),
            [Turn("What is this?", "A dog."), Turn("Why?", "So.")],
        )
        document = pair.processor.encode(turns, [image.size for image in images])
        seen = pair.processor.pictures(images)
        rotary = pair.processor.rotary(document.input_ids, seen)
        made.append(LoadedDocument(number, 0, document, seen, rotary))
    return pair, made


def batch_of(pair, packs: list[list[LoadedDocument]]) -> dict:
    batch = Collate(pair.processor.pad_token_id)([LoadedPack(pack) for pack in packs])
    return {name: value for name, value in batch.items() if name != "drops"}


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "smolvlm2", "mistral3"])
def test_tiles_are_counted_whatever_their_pixels(folder, name):
    """Of packed documents, padded to the one with most tiles; black corners are no padding."""
    pair, made = documents(folder(name))
    sizes = [{k: v.shape for k, v in one.pictures.items()} for one in made if one.pictures]
    if name == "mistral3":  # patches, of pictures cut to whole ones
        patch = pair.student.vision.config.patch_size
        images = [d.pictures["image_sizes"] // patch for d in made[:2]]
        expected = int(torch.cat(images).prod(1).sum())
    elif name == "llava-next":
        expected = sum(pair.processor.pictures([i])["pixel_values"].shape[1]
                       for n, count in enumerate((1, 2)) for i in pictures(count, n))  # fmt: skip
    else:  # those of a document are padded to each other nowhere else
        expected = sum(shapes["pixel_values"][:2].numel() for shapes in sizes)
    batch = batch_of(pair, [made])
    batch["pictures"]["pixel_values"][..., 0, 0, 0] = 0
    assert pair.student.tiles(batch["pictures"]) == expected


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl", "ovis2", "gemma3", "mistral3", "kimi"])
def test_a_batch_of_text_gives_every_trained_parameter_a_gradient(folder, name):
    """Under ZeRO a rank without pictures must take part in what the others reduce."""
    pair, made = documents(folder(name))
    train_only(pair.student)
    distiller = Distiller(pair.student.train(), None, LABELS)
    for packs in ([[made[2]]], [made]):
        batch = batch_of(pair, packs)
        distiller(batch, distiller.supervise(batch), 1.0, False)["loss"].backward()
        missing = [
            n for n, p in pair.student.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert not missing
        seen = max(p.grad.abs().max() for p in pair.student.projector.parameters())
        assert (seen > 0) == bool(batch["pictures"])
        pair.student.zero_grad()


@pytest.mark.parametrize(("name", "backend"), [
    (name, backend)
    for name in ("gemma3", "paligemma2", "llava-gemma2", "qwen2.5-vl")
    for backend in ("eager", "flex_attention")
])  # fmt: skip
@torch.compiler.set_stance("force_eager")  # test_attention_backends.py compiles flex_attention
def test_backends_agree_on_packed_rows(folder, name, backend):
    """Also with pictures seen both ways, sliding windows and soft caps."""
    pair, made = documents(folder(name))
    batch = batch_of(pair, [made])
    distiller = Distiller(pair.student.eval(), None, LABELS)
    with torch.no_grad():
        expected = pair.student(**student_inputs(batch))
        distiller.use_attention(backend)
        assert distiller.attention == backend
        found = pair.student(**student_inputs(batch))
        alone = torch.cat(
            [pair.student(**student_inputs(batch_of(pair, [[one]])))[0] for one in made]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0, : len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "backend", "device", "takes", "why"), [
    ("gemma3", "flash_attention_2", "cuda", "sdpa", "positions that see what follows"),
    ("paligemma", "varlen", "cuda", "sdpa", "positions that see what follows"),
    ("llava-gemma2", "sdpa", "cpu", "eager", "soft caps"),
    ("llava-gemma2", "sdpa", "cuda", "flex_attention", "soft caps"),
    ("llava-gpt-oss", "flash_attention_2", "cpu", "eager", "sinks"),
    ("qwen2.5-vl", "varlen", "cuda", "varlen", ""),
])  # fmt: skip
def test_a_backend_that_cannot_gives_way_and_is_named(
    folder, caplog, name, backend, device, takes, why
):
    student = load_student(folder(name))
    with caplog.at_level(logging.WARNING, "ldistill.distill.attention"):
        assert fitting_attention(backend, student.backbone, bool(student.sees), device) == takes
    assert why in caplog.text
    assert bool(why) == (f"{takes} computes it" in caplog.text)


@pytest.mark.parametrize(("backend", "takes"), [("varlen", "sdpa"), ("flash_attention_2",) * 2])
def test_dropout_is_not_lost_in_a_backend_without_it(folder, backend, takes):
    decoder = load_student(folder("qwen2.5-vl")).backbone
    decoder.config.attention_dropout = 0.1
    assert fitting_attention(backend, decoder, False, "cuda") == takes


def test_adapters_on_a_decoder_of_several_axes_are_merged_into_the_checkpoint(folder, tmp_path):
    pair, made = documents(folder("qwen2.5-vl"))
    train_only(pair.student)
    add_lora(pair.student, rank=2)
    student = pair.student.eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    batch = batch_of(pair, [made])
    assert weight_updates(student, gather_trained(student))
    pair.export(gather_trained(student), tmp_path)
    with torch.no_grad():
        expected = student(**student_inputs(batch))
        again = load_student(tmp_path).eval()
        torch.testing.assert_close(again(**student_inputs(batch)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "glm4v", "gemma3"])
def test_a_decoder_alone_is_its_lm(folder, name, tmp_path):
    export_decoder(folder(name), tmp_path)
    lm, student = AutoModelForCausalLM.from_pretrained(tmp_path), load_student(folder(name))
    assert lm.config.model_type == FAMILIES[name].lm
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        expected = student.eval().lm_head(student(ids))
        torch.testing.assert_close(lm.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_picture_that_the_processor_refuses_is_a_bad_image(folder):
    processor = load_processor(folder("qwen2-vl"))
    thin = Image.new("RGB", (3000, 10))
    for refused in (
        lambda: processor.pictures([thin]),
        lambda: processor.picture_texts([thin.size]),
    ):
        with pytest.raises(BadImage, match="refused picture: 3000 x 10"):
            refused()


def test_answers_start_where_the_template_invites_them(folder):
    """OneVision's starts an answer with a blank that its invitation does not have."""
    processor = load_processor(folder("llava-onevision"))
    turns = [Turn("What?", "yes"), Turn("Why?", "so")]
    text = processor.tokenizer.decode(processor.encode(turns).input_ids)
    asked = processor.tokenizer.decode(processor.prompt(turns[:1], "Why?"))
    assert text.startswith(asked + "so")
