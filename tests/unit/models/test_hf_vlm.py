"""LLaVA and SmolVLM students: transformers' own results, exact checkpoints, LoRA, refused pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_pairs import WRITERS, decoder_config, write_llava, write_smolvlm
from pairs import VOCAB, random_batch, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from ldistill.common.samples import Turn
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.evaluation.commands import generate
from ldistill.models.fit import check_pair
from ldistill.models.formats import export_like, load_processor, load_student
from ldistill.models.lora import add_lora, weight_updates
from ldistill.models.pair import check_tokenizers, load_pair
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
        ids = ours.prompt([], "what is red?", [image.size for image in images])
        assert ids.tolist() == expected["input_ids"][0].tolist()
        seen = ours.pictures(images)
        assert set(seen) == set(expected) - {"input_ids", "attention_mask"}
        assert all(torch.equal(value, expected[name]) for name, value in seen.items())


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
        patches = "<image>" * {"llava": 16, "smolvlm": 4}[kind]
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
    image = processor.literals
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
    document = processor.encode(turns, [(40, 30)] * 3, system)
    text = processor.tokenizer.decode(document.input_ids)
    [shown] = processor.picture_texts([(40, 30)])
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
    ids, pixels = batch["input_ids"][1:], batch["pictures"]["pixel_values"][1:]
    with torch.no_grad():
        expected = vlm(input_ids=ids, pixel_values=pixels).logits
        logits = student.lm_head(student(ids, pictures={"pixel_values": pixels}))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    new = student.generate(ids, {"pixel_values": pixels}, **options)
    whole = vlm.generate(input_ids=ids, pixel_values=pixels, **options)
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
    (tmp_path / "run" / "recipe.yaml").write_text("{recipe: mine, student: vlm, distil: language}")
    assert export_student(tmp_path / "run", tmp_path / "out") == tmp_path / "run" / "student"
    names = {p.name for p in base.iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
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
    kinds = [decoder_config(kind, num_key_value_heads=2) for kind in ("llama", "qwen2")]
    with pytest.raises(ValueError, match=r"teacher qwen2; their tensors differ: .*q_proj.bias"):
        check_pair(*kinds, None)


def test_decoders_of_two_kinds_are_run_to_see_whether_they_are_one():
    """Same tensors: Mistral without windows is a Llama, Gemma, which scales and shifts, is not."""
    llama, mistral, gemma = (
        decoder_config(k, num_key_value_heads=2, head_dim=8, sliding_window=None, hidden_act="silu")
        for k in ("llama", "mistral", "gemma")
    )
    check_pair(llama, mistral, None)
    gemma.hidden_activation = "silu"
    with pytest.raises(ValueError, match=r"teacher gemma; with equal weights their outputs differ"):
        check_pair(llama, gemma, None)
    state = torch.random.get_rng_state()
    check_pair(llama, mistral, None)
    assert torch.equal(state, torch.random.get_rng_state())  # a run's own draws are not moved


def test_a_raised_rotary_base_is_refused_or_borrowed(roots, tmp_path, caplog):
    """--teacher_rope student: the teacher's queries are rotated at the student's base."""
    raised = {"rope_type": "default", "rope_theta": 50000.0}
    write_llava(tmp_path, rope_parameters=raised, seed=3)
    pair = (str(tmp_path / "student"), str(roots["llava"] / "teacher"))
    with pytest.raises(ValueError, match=r"rope_theta: student 50000.0.*--teacher_rope student"):
        load_pair(*pair)
    lm = load_pair(*pair, teacher_rope="student").lm
    assert "rotary base is 50000 instead of its own 10000" in caplog.text
    expected = 50000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(lm.model.rotary_emb.inv_freq, expected)


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


def test_a_window_that_no_row_outgrows_is_none(tmp_path):
    write_llava(tmp_path, kind="mistral", sliding_window=64)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(config | {"sliding_window": None}))
    where = (str(tmp_path / "student"), str(tmp_path / "teacher"))
    load_pair(*where, max_length=64)
    for longest in (96, None):
        with pytest.raises(ValueError, match="sliding_window: student 64, teacher None"):
            load_pair(*where, max_length=longest)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("dynamic", {}), ("longrope", {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4})],
)
def test_frequencies_that_depend_on_the_length_are_refused_beyond_it(kind, more):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | more
    config = decoder_config("llama", rope_parameters=rope)
    fixed = config.max_position_embeddings
    message = rf"decoder chooses its rotary.*rope_type '{kind}'.*--max_length {fixed} or less"
    check_pair(config, config, None, fixed)
    with pytest.raises(ValueError, match=message):
        check_pair(config, config, None, fixed + 1)


def test_dynamic_frequencies_are_the_lms_own_in_rows_of_its_length():
    """InternVL3's decoders on their LMs, Qwen2.5: what transformers rotates with is equal."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    student, lm = decoder_config("llama", rope_parameters=rope), decoder_config("llama")
    fixed = lm.max_position_embeddings
    check_pair(student, lm, None, fixed)
    positions, hidden = torch.arange(fixed)[None], torch.zeros(1, fixed, 1)
    made = [AutoModel.from_config(c).rotary_emb for c in (student, lm)]
    for mine, its in zip(*(rotary(hidden, positions) for rotary in made), strict=True):
        assert torch.equal(mine, its)
    longer = made[0](hidden, positions + 1)[0]
    assert not torch.equal(longer, made[1](hidden, positions + 1)[0])


def test_unsupported_models_are_named_with_the_reason(roots, tmp_path):
    def with_config(values) -> str:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return str(tmp_path)

    teacher = str(roots["llava"] / "teacher")
    with pytest.raises(ValueError, match=r"'mllama' model, which is not.*Supported: nanoVLM"):
        load_pair(with_config({"model_type": "mllama", "vision_config": {}}), "not/there")
    with pytest.raises(ValueError, match="'lfm2_vl' model, which is not supported"):
        load_pair(with_config({"model_type": "lfm2_vl", "vision_config": {}}), teacher)
    with pytest.raises(ValueError, match=r"no vision tower.*swapped"):
        load_pair(teacher, teacher)
    with pytest.raises(ValueError, match="is a 'llava' model, which sees"):
        load_pair(str(roots["llava"] / "student"), str(roots["llava"] / "student"))
    for kind, layers, reason in (
        ("qwen3_5_text", ["linear_attention", "full_attention"], "has linear_attention layers"),
        ("lfm2", ["conv", "full_attention"], "has conv layers"),
        ("llama4_text", ["chunked_attention"] * 2, "attends in chunks"),
        ("mllama_text_model", None, "sees pictures through cross-attention layers"),
    ):
        config = AutoConfig.for_model(kind, num_hidden_layers=2, layer_types=layers)
        with pytest.raises(ValueError, match=f"the student's decoder {reason}"):
            check_pair(config, decoder_config("llama"), None)
    with pytest.raises(ValueError, match=r"no_rope_layers: student \[1, 0\], teacher \[1, 1\]"):
        check_pair(
            decoder_config("smollm3"), decoder_config("smollm3", no_rope_layers=[1, 1]), None
        )


def test_processors_that_do_not_fit_are_refused(roots, tmp_path):
    student = roots["llava"] / "student"
    with pytest.raises(ValueError, match="llava sees every picture whole"):
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
    ids = torch.tensor([2, VOCAB - 1, pair.student.image_token_id, VOCAB + 1, 340])
    assert distiller.known(ids).tolist() == [True, True, False, True, False]
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
