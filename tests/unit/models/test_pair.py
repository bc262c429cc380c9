"""Pairs: the key map both ways, strict loading, the compatibility check, parameter groups."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pairs import small_config, write_pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ldistill.common.locate import resolve
from ldistill.models.formats import export_like, load_processor, load_student
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_format import INV_FREQ, to_disk
from ldistill.models.pair import load_pair
from ldistill.models.parts import train_only
from ldistill.training.optimizer import Rates, parameter_groups


def test_real_configuration_has_the_published_tensors():
    """441 tensors on disk and 460,113,984 parameters, as huggingface/nanoVLM's 460M-8k has."""
    with torch.device("meta"):
        model = NanoVLM(NanoVLMConfig())
    disk = to_disk(model)
    assert len(disk) == 441
    assert sum(p.numel() for p in model.parameters()) == 460_113_984
    shapes = {name: list(tensor.shape) for name, tensor in disk.items()}
    assert shapes["vision_encoder.patch_embedding.position_embedding"] == [1, 1024, 768]
    assert shapes["vision_encoder.blocks.11.attn.qkv_proj.weight"] == [2304, 768]
    assert shapes["vision_encoder.blocks.0.ln2.bias"] == [768]
    assert shapes["vision_encoder.layer_norm.weight"] == [768]
    assert shapes["decoder.head.weight"] == [49218, 960]
    assert shapes["decoder.blocks.31.attn.k_proj.weight"] == [320, 960]
    assert shapes["decoder.blocks.0.mlp.down_proj.weight"] == [960, 2560]
    assert shapes["decoder.blocks.0.norm1.weight"] == [960]
    assert shapes["MP.proj.weight"] == [960, 12288]
    assert shapes[INV_FREQ] == [32]


class ReferenceNanoVLM:
    """nanoVLM's forward written out from its published description, on the disk tensors alone."""

    def __init__(self, folder):
        self.w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())

    def vision(self, pixels):
        c, w = self.c, self.w
        p = "vision_encoder."
        x = F.conv2d(pixels.double(), w[p + "patch_embedding.conv.weight"],
                     w[p + "patch_embedding.conv.bias"], stride=c["vit_patch_size"])  # fmt: skip
        x = x.flatten(2).transpose(1, 2) + w[p + "patch_embedding.position_embedding"]
        heads, width = c["vit_n_heads"], c["vit_hidden_dim"]
        for i in range(c["vit_n_blocks"]):
            b = f"{p}blocks.{i}."

            def norm(name, x, b=b):
                return F.layer_norm(x, (width,), w[f"{b}{name}.weight"], w[f"{b}{name}.bias"], 1e-6)

            def linear(name, x, b=b):
                return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

            qkv = linear("attn.qkv_proj", norm("ln1", x))
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.split(width, -1))
            a = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1) @ v
            x = x + linear("attn.out_proj", a.transpose(1, 2).flatten(2))
            x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("ln2", x)), approximate="tanh"))
        weight, bias = w[p + "layer_norm.weight"], w[p + "layer_norm.bias"]
        return F.layer_norm(x, (width,), weight, bias, 1e-6)

    def project(self, x):
        s, (b, n, d) = self.c["mp_pixel_shuffle_factor"], x.shape
        side = int(n**0.5)
        out = torch.zeros(b, (side // s) ** 2, s * s * d, dtype=x.dtype)
        for row in range(side // s):
            for col in range(side // s):
                patches = [
                    x[:, (row * s + i) * side + col * s + j] for i in range(s) for j in range(s)
                ]
                out[:, row * (side // s) + col] = torch.cat(patches, -1)
        return out @ self.w["MP.proj.weight"].T

    def __call__(self, ids, pixels, image_token):
        c, w = self.c, self.w
        x = w["decoder.head.weight"][ids]
        x[ids == image_token] = self.project(self.vision(pixels)).flatten(0, 1)
        dim = c["lm_hidden_dim"] // c["lm_n_heads"]
        angle = torch.arange(ids.shape[1])[:, None] * w["decoder.rotary_embd.inv_freq"][None]
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def rms(x, weight):
            return x * (x.pow(2).mean(-1, keepdim=True) + c["lm_rms_eps"]).rsqrt() * weight

        def rope(t):
            half = torch.cat([-t[..., dim // 2 :], t[..., : dim // 2]], -1)
            return t * cos + half * sin

        for i in range(c["lm_n_blocks"]):
            b = f"decoder.blocks.{i}."
            h = rms(x, w[b + "norm1.weight"])
            q, k, v = (
                (h @ w[f"{b}attn.{n}_proj.weight"].T).unflatten(-1, (-1, dim)).transpose(1, 2)
                for n in "qkv"
            )
            group = c["lm_n_heads"] // c["lm_n_kv_heads"]
            q, k = rope(q), rope(k).repeat_interleave(group, 1)
            scores = q @ k.transpose(-1, -2) / dim**0.5
            scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
            a = scores.softmax(-1) @ v.repeat_interleave(group, 1)
            x = x + a.transpose(1, 2).flatten(2) @ w[b + "attn.out_proj.weight"].T
            h = rms(x, w[b + "norm2.weight"])
            gate = F.silu(h @ w[b + "mlp.gate_proj.weight"].T) * (h @ w[b + "mlp.up_proj.weight"].T)
            x = x + gate @ w[b + "mlp.down_proj.weight"].T
        return rms(x, w["decoder.norm.weight"]) @ w["decoder.head.weight"].T


def test_student_computes_what_nanovlm_computes(pair_root):
    model = load_student(pair_root / "student").eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (2, 24), generator=generator)
    ids[:, 3:7] = model.image_token_id
    pixels = torch.rand(2, 3, 32, 32, generator=generator)
    expected = ReferenceNanoVLM(pair_root / "student")(ids, pixels, model.image_token_id)
    with torch.no_grad():
        logits = model.lm_head(model(ids, pictures={"pixel_values": pixels}))
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_round_trip_is_bit_exact(pair_root, tmp_path):
    base = pair_root / "student"
    model = load_student(base)
    trained = dict(model.named_parameters())
    export_like(base, {k: v for k, v in trained.items() if "vision" not in k}, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert list(old) == list(new)
    assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"decoder.token_embedding.weight": "decoder.head.weight"}
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_export_keeps_the_checkpoints_dtype(pair_root, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pair_root / "student", base)
    half = {k: v.half() for k, v in load_file(base / "model.safetensors").items()}
    metadata = {"decoder.token_embedding.weight": "decoder.head.weight"}
    save_file(half, base / "model.safetensors", metadata=metadata)
    model = load_student(base)
    export_like(base, dict(model.projector.named_parameters(prefix="projector")), tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[k], half[k]) for k in half)


def test_untied_student_round_trips(tmp_path):
    write_pair(tmp_path, lm_tie_weights=False)
    model = load_student(tmp_path / "student")
    assert model.lm_head.weight is not model.decoder.model.embed_tokens.weight
    export_like(tmp_path / "student", {}, tmp_path / "out")
    old = load_file(tmp_path / "student" / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert "decoder.token_embedding.weight" in old
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_an_export_keeps_keys_that_are_not_known(pair_root, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pair_root / "student", base)
    values = json.loads((base / "config.json").read_text())
    text = json.dumps({"new_upstream_key": 1} | values, indent=4)
    (base / "config.json").write_text(text)
    export_like(base, {}, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


def corrupt(pair_root, tmp_path, change):
    shutil.copytree(pair_root / "student", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return tmp_path / "bad"


def test_missing_and_unknown_keys_are_listed(pair_root, tmp_path):
    def change(tensors):
        del tensors["MP.proj.weight"], tensors["decoder.rotary_embd.inv_freq"]
        tensors["decoder.blocks.9.norm1.weight"] = torch.zeros(48)
        tensors["decoder.norm.weight"] = torch.zeros(47)

    with pytest.raises(ValueError, match="problems") as error:
        load_student(corrupt(pair_root, tmp_path, change))
    for part in (
        "missing MP.proj.weight",
        "missing decoder.rotary_embd.inv_freq",
        "unknown decoder.blocks.9.norm1.weight",
        "shape of decoder.norm.weight: [47] in the file, [48]",
    ):
        assert part in str(error.value)


def test_truncated_weights_are_an_error(pair_root, tmp_path):
    shutil.copytree(pair_root / "student", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_student(tmp_path / "cut")


def test_every_differing_field_is_named(pair_root, tmp_path):
    write_pair(tmp_path, lm_n_kv_heads=3, lm_re_base=50000, lm_n_blocks=2, lm_rms_eps=1e-6)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pair(str(pair_root / "student"), str(tmp_path / "teacher"))
    message = str(error.value)
    assert "num_hidden_layers: student 3, teacher 2" in message
    assert "num_key_value_heads: student 2, teacher 3" in message
    assert "rope_theta: student 10000.0, teacher 50000.0" in message
    assert "rms_norm_eps: student 1e-05, teacher 1e-06" in message
    assert "hidden_size" not in message


def test_a_checkpoint_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve("pkg://ldistill/nowhere")
    with pytest.raises(FileNotFoundError, match="hub"):
        resolve("nobody/no-such-model-at-all")


def test_a_processor_fetches_no_weights(pair_root, monkeypatch):
    """Shards of a 13B student are built without its 26 GB."""
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, tuple(allow_patterns)))
        return str(pair_root / repo.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    processor = load_processor("team/student", "team/teacher")
    assert processor.fingerprint() == load_processor(pair_root / "student").fingerprint()
    assert {repo for repo, _ in asked} == {"team/student", "team/teacher"}
    assert not any("safetensors" in p or "pytorch" in p for _, ps in asked for p in ps)
    resolve("team/student")
    assert "*.safetensors" in asked[-1][1]


def test_processor_refuses_a_foreign_tokenizer(pair_root, tmp_path):
    shutil.copytree(pair_root / "student", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["lm_base_vocab_size"], config["lm_vocab_size"] = 400, 466
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expects 400"):
        load_processor(tmp_path / "other")


def test_parameter_groups_cover_what_trains_once(pair_root):
    student = load_student(pair_root / "student")
    train_only(student)
    groups = parameter_groups(student, Rates(2e-5, 3e-4, 1e-4), 0.1)
    grouped = [p for g in groups for p in g["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in student.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in student.vision.parameters())
    rate_of = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rate_of[id(student.projector.proj.weight)] == 3e-4
    assert rate_of[id(student.decoder.model.norm.weight)] == 1e-4
    decay_of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay_of[id(student.decoder.model.norm.weight)] == 0
    assert decay_of[id(student.lm_head.weight)] == 0.1


def test_rotary_frequencies_survive_a_cast(pair_root):
    model = load_student(pair_root / "student")
    before = model.decoder.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.projector.proj.weight.dtype == torch.bfloat16
    assert torch.equal(model.decoder.model.rotary_emb.inv_freq, before)


def test_generation_does_not_depend_on_padding(pair_root):
    """Left-padded beside a longer prompt, a prompt gives the tokens it gives alone."""
    model = load_student(pair_root / "student").eval()
    config = small_config()
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(3, 300, (1, 9), generator=generator)
    short[0, 1:5] = config.image_token_id
    long = torch.randint(3, 300, (1, 15), generator=generator)
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    alone = model.generate(short, {"pixel_values": pixels}, **options)
    padded = torch.cat([torch.full((1, 6), 2), short], 1)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, :6] = 0
    prompts = torch.cat([long, padded])
    both = model.generate(prompts, {"pixel_values": pixels}, mask, **options)
    assert torch.equal(both[1], alone[0])
