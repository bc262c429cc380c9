"""Phase 2 of the tiny pair: a vision tower and projector learn to speak to the frozen LM.

Long on purpose: only when the frozen language model itself reads the picture tokens is it a teacher
worth listening to. The decoder is the language model's, weight for weight, plus rows for the image
tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import Processor
from ldistill.tiny.pictures import SIZE
from ldistill.tiny.scenes import SOURCES, captioned
from ldistill.tiny.tokenizer import MAX_LENGTH
from ldistill.tiny.training import Coded, Phase, batches, encode_chat, optimise, pad, pixels
from ldistill.tiny.world import World

ALIGNMENT = Phase(steps=1200, batch_size=32, rate=5e-4)
TEACHER_NAME = "pkg://ldistill.tiny/pair/teacher"


def student_config(lm: LlamaForCausalLM) -> NanoVLMConfig:
    """nanoVLM's configuration of the tiny student: 64 x 64 pixels, 16 image tokens."""
    config, base = lm.config, lm.config.vocab_size
    return NanoVLMConfig(
        vit_hidden_dim=96,
        vit_inter_dim=256,
        vit_patch_size=8,
        vit_img_size=SIZE,
        vit_n_heads=4,
        vit_n_blocks=3,
        vit_model_type="ldistill-tiny",
        lm_hidden_dim=config.hidden_size,
        lm_inter_dim=config.intermediate_size,
        lm_re_base=int(config.rope_parameters["rope_theta"]),
        lm_max_position_embeddings=MAX_LENGTH,
        lm_base_vocab_size=base,
        lm_vocab_size=base + 66,
        lm_n_heads=config.num_attention_heads,
        lm_n_kv_heads=config.num_key_value_heads,
        lm_n_blocks=config.num_hidden_layers,
        lm_max_length=MAX_LENGTH,
        lm_model_type=TEACHER_NAME,
        lm_tokenizer=TEACHER_NAME,
        mp_pixel_shuffle_factor=2,
        mp_image_token_length=16,
        max_img_size=4 * SIZE,
        hf_repo_name="ldistill-tiny",
    )


def new_student(lm: LlamaForCausalLM, seed: int) -> NanoVLM:
    """A student whose decoder is `lm` plus rows for the image tokens; vision is random."""
    torch.manual_seed(seed)
    student = NanoVLM(student_config(lm))
    state = lm.state_dict()
    rows = state["model.embed_tokens.weight"]
    extra = rows.mean(0) + 0.02 * torch.randn(66, rows.shape[1])
    grown = torch.cat([rows, extra])
    state |= {"model.embed_tokens.weight": grown, "lm_head.weight": grown}
    student.decoder.load_state_dict(state)
    _expect_paper(student)
    return student


@torch.no_grad()
def _expect_paper(student: NanoVLM) -> None:
    """Start the patch embedding where light paper gives nothing and ink much.

    nanoVLM feeds pixels in [0, 1] as they are; on nearly white pictures their mean would drown
    what is drawn.
    """
    patch = student.vision.embeddings.patch_embedding
    patch.weight.mul_(4)
    patch.bias.copy_(-0.94 * patch.weight.sum((1, 2, 3)))


def align(
    student: NanoVLM,
    processor: Processor,
    world: World,
    phase: Phase = ALIGNMENT,
    advance: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train vision tower and projector on pictures of all sources; returns the final loss."""
    student.requires_grad_(False)
    seeing = nn.ModuleList([student.vision, student.projector]).requires_grad_(True)
    steps = _losses(student, _documents(world, processor, phase), processor.pad_token_id, phase)
    loss = optimise(phase, seeing, steps, advance)
    student.eval()
    return loss


def _documents(world: World, processor: Processor, phase: Phase) -> Iterator[Coded]:
    image_text = processor.image_text([(1, 1)])
    for index in range((phase.steps + 16) * phase.batch_size):
        source = tuple(SOURCES)[index % len(SOURCES)]
        made = captioned(world, source, index // len(SOURCES))
        coded = encode_chat(processor.tokenizer, made.turns, image_text)
        yield Coded(*coded, picture=made.images[0])


def _losses(
    student: NanoVLM, documents: Iterator[Coded], pad_id: int, phase: Phase
) -> Iterator[Callable[[], Tensor]]:
    for batch in batches(documents, phase.batch_size, lambda document: len(document.ids)):
        ids, labels = pad(batch, pad_id)
        pictures = pixels([Image.open(io.BytesIO(document.picture)) for document in batch])

        def loss(ids=ids, labels=labels, pictures=pictures) -> Tensor:
            hidden = student.decoder.model(
                inputs_embeds=embed_trainable(student, ids, pictures), use_cache=False
            ).last_hidden_state
            learnt = labels >= 0
            return F.cross_entropy(student.decoder.lm_head(hidden[learnt]), labels[learnt])

        yield loss


def embed_trainable(student: NanoVLM, ids: Tensor, pictures: Tensor) -> Tensor:
    """`student.embed` with a vision tower that learns (the student's own is always frozen)."""
    embeds = student.decoder.get_input_embeddings()(ids)
    image = student.projector(student.vision(pictures).last_hidden_state).flatten(0, 1)
    return embeds.masked_scatter((ids == student.image_token_id).unsqueeze(-1), image)
