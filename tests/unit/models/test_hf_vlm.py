"""LLaVA and SmolVLM students: transformers' own results, exact checkpoints, LoRA, refused pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_pairs import SIDE, WRITERS, decoder_config, write_llava, write_smolvlm
from pairs import VOCAB, random_batch, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from ldistill.common.samples import Turn
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.evaluation.commands import generate
from ldistill.models.formats import export_like, load_processor, load_student
from ldistill.models.hf_vlm_processor import Idefics3Settings
from ldistill.models.lora import add_lora, weight_updates
from ldistill.models.pair import check_pair, check_tokenizers, load_pair
from ldistill.models.parts import train_only
from ldistill.models.weights import load_lm
from ldistill.training.export import export_decoder, export_student
from ldistill.training.optimizer import Rates, parameter_groups

KINDS = ["llava", "smolvlm", "llava-qwen2"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        WRITERS[kind](made[kind])
    return made


@pytest.fixture(params=KINDS)
def root(request, roots) -> Path:
    return roots[request.param]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(data.numpy())


def user(text: str, pictures: int = 1) -> dict:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


# ---- inputs ----


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_prompts_are_those_of_transformers(roots, tiling, pictures):
    """Ids and pixels that AutoProcessor gives, single picture, several, tiled."""
    for kind in ["llava", "smolvlm"]:
        if tiling and kind == "llava":
            continue
        folder = roots[kind] / "student"
        ours = load_processor(folder, tiling=tiling, max_images=2)
        theirs = AutoProcessor.from_pretrained(folder)
        images = [picture(90, 41 + 30 * n, n) for n in range(pictures)]
        options = {"do_image_splitting": tiling} if kind == "smolvlm" else {}
        text = theirs.apply_chat_template([user("what is red?", pictures)],
                                          add_generation_prompt=True)  # fmt: skip
        own_start = text.startswith(theirs.tokenizer.bos_token)
        expected = theirs(
            text=text, images=images or None, return_tensors="pt",
            add_special_tokens=not own_start, **(options if images else {}),
        )  # fmt: skip
        cut = [ours.tiles(image) for image in images]
        ids = ours.prompt([], "what is red?", [grid for _, grid in cut])
        assert ids.tolist() == expected["input_ids"][0].tolist()
        if images:
            pixels = expected["pixel_values"].reshape(-1, 3, SIDE, SIDE)
            real = pixels[(pixels != 0).flatten(1).any(1)]  # Idefics3 pads to the most tiles
            assert torch.equal(torch.cat([tiles for tiles, _ in cut]), real)


def test_grids_are_those_of_transformers(roots):
    """The header's size alone must give the tiles that the picture is really cut into."""
    ours = load_processor(roots["smolvlm"] / "student", tiling=True)
    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(1, 200, (60, 2), generator=generator).tolist():
        tiles, grid = ours.tiles(picture(width, height))  # raises where the two disagree
        assert len(tiles) == ours.images.tiles(grid) <= 17
    sizes = {Idefics3Settings(512, 64, tiling=True).grid(w, 480) for w in (30, 480, 640, 4000)}
    assert len(sizes) > 2


def test_answers_and_their_end_marks_are_supervised(roots):
    turns = [Turn("what?", "yes"), Turn("and the <image> dog?", "over there")]
    expected = {
        "llava": (" yes</s> over there</s>", "<s>USER: <image>\nwhat? ASSISTANT: yes</s> USER:"),
        "smolvlm": (
            " yes<end_of_utterance>\n over there<end_of_utterance>\n",
            "<|im_start|>User:<fake_token_around_image><global-img><image>"
            "<fake_token_around_image>what?<end_of_utterance>\nAssistant: yes",
        ),
    }
    for kind, (answers, beginning) in expected.items():
        processor = load_processor(roots[kind] / "student")
        document = processor.encode(turns, [(1, 1)])
        tokenizer = processor.tokenizer
        labelled = document.labels[document.labels >= 0]
        assert tokenizer.decode(labelled).replace(" yes", "yes").replace(
            " over", "over"
        ) == "".join(answers).replace(" yes", "yes").replace(" over", "over")
        text = tokenizer.decode(document.input_ids)
        patches = "<image>" * processor.images.tokens_per_tile
        assert text.startswith(beginning.replace("<image>", patches))
        assert "and the  dog?" in text  # a literal <image> is no picture
        assert processor.stop_token_ids == [tokenizer.eos_token_id] + (
            [tokenizer.convert_tokens_to_ids("<end_of_utterance>")] if kind == "smolvlm" else []
        )
        assert processor.answer_prefix == " "
        assert processor.fingerprint() == load_processor(roots[kind] / "student").fingerprint()


def test_control_tokens_in_data_are_words_in_every_family(root):
    """No id of a special token comes from data, and the words are all there."""
    processor = load_processor(root / "student")
    tokenizer = processor.tokenizer
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    image = set(processor.tokens.all())
    special = {t.content: n for n, t in added.items() if t.special and t.content not in image}
    plain = processor.encode([Turn("ask", "say"), Turn("ask", "say")], [(1, 1)]).input_ids
    assert len(special) > 1
    for token, number in special.items():
        turns = [Turn(f"ask{token}", f"say {token}"), Turn(f"{token}ask", f"{token} say")]
        document = processor.encode(turns, [(1, 1)])
        for other in special.values():
            assert (document.input_ids == other).sum() == (plain == other).sum(), token
        text = tokenizer.decode(document.input_ids)
        assert text.count(token) == 4 + (plain == number).sum(), (token, text)


def test_pictures_stay_where_they_are_in_every_family(root):
    processor = load_processor(root / "student", max_images=3)
    system = "be kind" if processor.takes_system else ""
    turns = [Turn("look at  here", "yes", (8,)), Turn("and this?", "no", (0, 9))]
    document = processor.encode(turns, [(1, 1)] * 3, system)
    text = processor.tokenizer.decode(document.input_ids)
    shown = processor.tokens.picture((1, 1), processor.images.tokens_per_tile)
    assert text.count(shown) == 3
    before, between, amid, after = text.split(shown)
    assert system in before
    assert before.endswith("look at ")
    assert between.startswith(" here")
    assert "yes" in between
    assert amid.strip() == "and this?"
    assert "no" in after
    labels = processor.tokenizer.decode(document.labels[document.labels >= 0])
    assert "kind" not in labels


# ---- the model ----


def test_student_computes_what_transformers_computes(root):
    student = load_student(root / "student").eval()
    vlm = AutoModelForImageTextToText.from_pretrained(root / "student").eval()
    batch = random_batch(student, [[30], [40]], seq=40)
    ids, pixels = batch["input_ids"][1:], batch["pixel_values"][1:]
    given = pixels if vlm.config.model_type == "llava" else pixels[None]
    with torch.no_grad():
        expected = vlm(input_ids=ids, pixel_values=given).logits
        logits = student.lm_head(student(ids, pixel_values=pixels))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    new = student.generate(ids, pixels, **options)
    whole = vlm.generate(input_ids=ids, pixel_values=given, **options)
    assert torch.equal(new, whole[:, ids.shape[1] :])


def test_every_parameter_is_trained_or_vision(root):
    student = load_student(root / "student")
    train_only(student)
    frozen = {id(p) for p in student.parameters() if not p.requires_grad}
    assert frozen == {id(p) for p in student.vision.parameters()}
    groups = parameter_groups(student, Rates(2e-5, 3e-4, 1e-4), 0.1)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in student.parameters()} - frozen
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {rates[id(p)] for p in student.projector.parameters()} == {3e-4}
    assert rates[id(student.lm_head.weight)] == 1e-4


# ---- the checkpoint ----


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}


def test_export_is_the_checkpoint_it_came_from(root, tmp_path):
    """Contract 7: files, keys, shapes, dtypes; nothing trained: bit for bit the same folder."""
    base, out = root / "student", tmp_path / "out"
    export_like(base, {}, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    old, new = tensors(base), tensors(out)
    for name, stored in old.items():
        assert list(new[name]) == list(stored)
        for key, tensor in stored.items():
            assert new[name][key].dtype == tensor.dtype
            assert torch.equal(new[name][key], tensor), key


def test_trained_weights_land_in_their_places(root, tmp_path):
    student = load_student(root / "student")
    train_only(student)
    trained = {n: p.detach() + 1 for n, p in student.named_parameters() if p.requires_grad}
    export_like(root / "student", trained, tmp_path / "out")
    again = load_student(tmp_path / "out")
    for name, parameter in again.named_parameters():
        before = student.get_parameter(name)
        moved = before + 1 if name in trained else before
        torch.testing.assert_close(parameter, moved, atol=0, rtol=1e-6, msg=name)


def test_half_precision_checkpoint_with_current_names(roots, tmp_path):
    """A float16 checkpoint of one file under today's names stays just that."""
    source, base = roots["llava"] / "student", tmp_path / "base"
    base.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copy(path, base)
    renamed = {}
    for stored in tensors(source).values():
        for key, tensor in stored.items():
            name = key.replace("language_model.model.", "model.language_model.")
            name = name.replace("language_model.lm_head", "lm_head")
            if name.startswith(("vision_tower", "multi_modal")):
                name = "model." + name
            renamed[name] = tensor.half()
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    student = load_student(base, dtype=torch.bfloat16)
    assert student.lm_head.weight.dtype == torch.bfloat16
    assert student.backbone.rotary_emb.inv_freq.dtype == torch.float32
    trained = {"vlm.lm_head.weight": torch.full(student.lm_head.weight.shape, 0.125)}
    export_like(base, trained, tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert new.keys() == renamed.keys()
    assert all(t.dtype == torch.float16 for t in new.values())
    assert (new["lm_head.weight"] == 0.125).all()
    assert all(torch.equal(new[k], renamed[k]) for k in new if k != "lm_head.weight")


def test_missing_weights_are_named(roots, tmp_path):
    shutil.copytree(roots["smolvlm"] / "student", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    stored = load_file(path)
    key = next(k for k in stored if k.endswith("layers.1.mlp.up_proj.weight"))
    del stored[key]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit its own") as error:
        load_student(tmp_path / "bad")
    assert "layers.1.mlp.up_proj.weight" in str(error.value)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read"):
        load_student(tmp_path / "bad")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_student(tmp_path / "bad")


def test_a_teacher_has_all_of_its_weights_or_is_refused(roots, tmp_path):
    """transformers would fill what is missing with random values."""
    folder = tmp_path / "teacher"
    shutil.copytree(roots["llava"] / "teacher", folder)
    path, whole = folder / "model.safetensors", load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj.weight"
    without_head = {k: t for k, t in whole.items() if k != "lm_head.weight"}

    def load(tensors):
        save_file(tensors, path, metadata={"format": "pt"})
        return load_lm(folder)

    for tensors, problem in (
        ({k: t for k, t in whole.items() if k != layer}, f"missing {layer}"),
        ({k.removeprefix("model."): t for k, t in without_head.items()}, "missing lm_head.weight"),
        (whole | {layer: whole[layer][:10].clone()}, rf"{layer}: \[10, 48\] in the file, \[96"),
        (whole | {"model.layers.7.norm": torch.ones(1)}, r"unknown model\.layers\.7\.norm"),
    ):
        with pytest.raises(ValueError, match=rf"{folder} does not fit its own(.|\n)*{problem}"):
            load(tensors)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert torch.equal(load(whole | old).lm_head.weight, whole["lm_head.weight"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = load(without_head)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=f"weights in {folder} cannot be loaded.*again"):
        load_lm(folder)


def test_run_folder_exports_and_generates(roots, tmp_path):
    """What `ldistill export` and `ldistill generate` do, on a folder as a run leaves it."""
    base = roots["smolvlm"] / "student"
    shutil.copytree(base, tmp_path / "run" / "student")
    assert export_student(tmp_path / "run", tmp_path / "out") == tmp_path / "run" / "student"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    picture(60, 40).save(tmp_path / "cat.png")
    for student in (tmp_path / "out", roots["llava"] / "student"):
        generate(str(student), "what is it?", [tmp_path / "cat.png"], max_new_tokens=4)
    export_decoder(tmp_path / "out", tmp_path / "decoder")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    student = load_student(base).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = student.lm_head(student(ids))
        torch.testing.assert_close(lm(ids).logits, expected, atol=1e-5, rtol=1e-5)


# ---- LoRA ----


@pytest.mark.parametrize("kind", ["nanovlm", "llava"])
def test_lora_trains_adapters_and_leaves_no_parameter_behind(kind, tmp_path):
    pytest.importorskip("peft")
    WRITERS[kind](tmp_path)
    pair = load_pair(str(tmp_path / "student"), str(tmp_path / "teacher"))
    train_only(pair.student)
    add_lora(pair.student, rank=3, alpha=12)
    distiller = Distiller(pair.student, Teacher(pair.lm), weights())
    batch = random_batch(pair.student, [[30], [24]])
    plan = distiller.supervise(batch)

    def loss(module):
        return module(batch, plan, 10.0, True)["loss"]

    trained = {n: p for n, p in pair.student.named_parameters() if p.requires_grad}
    projector = {id(p) for p in pair.student.projector.parameters()}
    assert all("lora_" in n or id(p) in projector for n, p in trained.items())
    layers = pair.student.backbone.config.num_hidden_layers
    assert sum("lora_" in n for n in trained) == 2 * 7 * layers
    frozen = {
        n: p.detach().clone() for n, p in pair.student.named_parameters() if not p.requires_grad
    }
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    before = loss(distiller).item()
    for _ in range(4):
        optimizer.zero_grad()
        loss(distiller).backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
    after = loss(distiller).item()
    assert after != pytest.approx(before, abs=1e-3)
    now = dict(pair.student.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    pair.export({n: p.detach() for n, p in trained.items()}, tmp_path / "out")
    old, new = tensors(tmp_path / "student"), tensors(tmp_path / "out")
    shapes = [{k: (t.shape, t.dtype) for s in f.values() for k, t in s.items()} for f in (old, new)]
    assert shapes[0] == shapes[1]
    merged = load_pair(str(tmp_path / "out"), str(tmp_path / "teacher"))
    plain = Distiller(merged.student, Teacher(merged.lm), weights())
    assert loss(plain).item() == pytest.approx(after, abs=1e-4)
    adapters = 2 * 7 * layers
    updates = weight_updates(pair.student, trained)
    assert len(updates) == len(trained) - adapters // 2


def test_lora_needs_a_rank_and_peft(roots, monkeypatch):
    student = load_student(roots["llava"] / "student")
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(student, rank=-1)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"ldistill\[lora\]"):
        add_lora(student, rank=4)


# ---- pairs that do not fit ----


def test_every_differing_field_is_named(roots, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    changes = {"num_hidden_layers": 3, "rms_norm_eps": 1e-6, "num_key_value_heads": 2}
    write_llava(tmp_path, rope_parameters=rope, **changes)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pair(str(roots["llava"] / "student"), str(tmp_path / "teacher"))
    for part in (
        "num_hidden_layers: student 2, teacher 3",
        "num_key_value_heads: student 6, teacher 2",
        "rms_norm_eps: student 1e-05, teacher 1e-06",
        "rope_type: student default, teacher linear",
        "rope_theta: student 10000.0, teacher 5000.0",
        "rope scaling: student {}, teacher {'factor': 2.0}",
    ):
        assert part in str(error.value)
    assert "hidden_size" not in str(error.value)
    other = decoder_config("llama", 500)
    with pytest.raises(ValueError, match="vocabulary: student 384, teacher 500"):
        check_pair(decoder_config("llama", 384), other, None)
    with pytest.raises(ValueError, match="model_type: student llama, teacher qwen2"):
        check_pair(decoder_config("llama"), decoder_config("qwen2"), None)


def test_a_teacher_with_another_tokenizer_is_refused(roots, tmp_path):
    """Same decoder, one ordinary token with another id: the ids and the number are named."""
    teacher = tmp_path / "teacher"
    shutil.copytree(roots["llava"] / "teacher", teacher)
    values = json.loads((teacher / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"2 of \d+ ids below 320 differ \(id \d+: student"):
        load_pair(str(roots["llava"] / "student"), str(teacher))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    load_pair(str(roots["llava"] / "student"), str(teacher))  # nothing to compare: a warning


def test_a_sentencepiece_teacher_is_compared(tmp_path):
    """Vicuna's folder has `tokenizer.model` alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = [f"the quick brown fox {n} jumps over lazy dogs {n * 7}" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=340,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = {model.id_to_piece(i): i for i in range(340)}
    assert "\u2581fox" in pieces

    def student(vocabulary):
        word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>")

    check_tokenizers(student(pieces | {"<image>": 340}), tmp_path, 340)
    pieces["\u2581fox"], pieces["\u2581dogs"] = pieces["\u2581dogs"], pieces["\u2581fox"]
    with pytest.raises(ValueError, match="2 of 337 ids below 340 differ"):
        check_tokenizers(student(pieces), tmp_path, 340)
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="cannot be read"):
        check_tokenizers(student(pieces), tmp_path, 340)


def test_sliding_windows_only_where_rows_outgrow_them(tmp_path):
    write_llava(tmp_path, kind="mistral", sliding_window=64)
    where = (str(tmp_path / "student"), str(tmp_path / "teacher"))
    load_pair(*where, max_length=64)
    with pytest.raises(ValueError, match=r"window of 64 tokens, but rows have up to 96.*--max_le"):
        load_pair(*where, max_length=96)
    with pytest.raises(ValueError, match="sliding window of 64"):
        load_pair(*where)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("dynamic", {}), ("longrope", {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4})],
)
def test_frequencies_that_depend_on_the_length_are_refused(kind, more):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | more
    config = decoder_config("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=rf"decoder chooses its rotary.*rope_type '{kind}'"):
        check_pair(config, config, None)


def test_unsupported_models_are_named_with_the_reason(roots, tmp_path):
    def with_config(values) -> str:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return str(tmp_path)

    teacher = str(roots["llava"] / "teacher")
    with pytest.raises(ValueError, match=r"'qwen2_vl' model, which is not.*Supported: nanoVLM"):
        load_pair(with_config({"model_type": "qwen2_vl", "vision_config": {}}), teacher)
    with pytest.raises(ValueError, match="'paligemma' model, which is not supported"):
        load_pair(with_config({"model_type": "paligemma", "vision_config": {}}), teacher)
    with pytest.raises(ValueError, match=r"no vision tower.*swapped"):
        load_pair(teacher, teacher)
    with pytest.raises(ValueError, match="is a 'llava' model, which sees"):
        load_pair(str(roots["llava"] / "student"), str(roots["llava"] / "student"))
    gemma = AutoConfig.for_model("gemma", hidden_size=48, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"teacher is a 'gemma' model; supported.*llama, mistral"):
        check_pair(decoder_config("llama"), gemma, None)
    with pytest.raises(ValueError, match=r"layers with RoPE: student \[1, 0\], teacher \[1, 1\]"):
        check_pair(
            decoder_config("smollm3"), decoder_config("smollm3", no_rope_layers=[1, 1]), None
        )


def test_processors_that_do_not_fit_are_refused(roots, tmp_path):
    student = roots["llava"] / "student"
    with pytest.raises(ValueError, match="one tile"):
        load_processor(student, tiling=True)
    with pytest.raises(ValueError, match="student expects 320"):
        load_processor(student, str(roots["llava"] / "teacher"))
    shutil.copytree(student, tmp_path / "plain")
    template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    (tmp_path / "plain" / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="does not render"):
        load_processor(tmp_path / "plain")


def test_the_image_token_may_lie_within_the_teachers_vocabulary(tmp_path):
    """Padded embeddings (Qwen's LM has more rows than tokens): a picture is still no text."""
    write_llava(tmp_path, kind="qwen2")
    teacher = AutoModelForCausalLM.from_config(decoder_config("qwen2", 340))
    teacher.save_pretrained(tmp_path / "teacher")
    pair = load_pair(str(tmp_path / "student"), str(tmp_path / "teacher"))
    distiller = Distiller(pair.student, Teacher(pair.lm), weights(), kv_scope="visual")
    assert distiller.teacher_vocab == VOCAB
    batch = random_batch(pair.student, [[40]])
    rows = distiller.supervise(batch).queries
    assert pair.student.image_token_id not in rows.token.tolist()
    output = distiller(batch, distiller.supervise(batch), 5.0, True)
    output["loss"].backward()
    head = distiller.teacher.head(torch.zeros(1, 48), F.linear)
    assert head.shape == (1, 340)


def test_smolvlm_writes_where_transformers_reads(tmp_path):
    """A round trip through transformers itself: what is exported loads there without complaint."""
    write_smolvlm(tmp_path)
    export_like(tmp_path / "student", {}, tmp_path / "out")
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
