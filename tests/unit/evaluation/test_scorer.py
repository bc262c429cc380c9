"""Every kind of model against a direct computation, and no answer changed by its batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ldistill.evaluation.commands import model_options
from ldistill.evaluation.scorer import Question, StudentScorer, cut, kind_of, load_scorer
from ldistill.models import formats, zoo
from ldistill.models.formats import load_processor, load_student

KINDS = ("nanovlm", "lm", "llava", "idefics3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pair_root):
    from hf_pairs import CHATML_TEMPLATE, write_llava, write_smolvlm

    root = tmp_path_factory.mktemp("vlms")
    return {
        "nanovlm": pair_root / "student",
        "lm": pair_root / "teacher",
        "llava": write_llava(root / "a", template=CHATML_TEMPLATE, shard_size="10MB"),
        "idefics3": write_smolvlm(root / "b", template=CHATML_TEMPLATE),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {kind: load_scorer(str(folder)) for kind, folder in folders.items()}


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(kind: str, seen: bool) -> list[Question]:
    """Prompts of many lengths; with pictures one, two or three of them."""
    asked = []
    for number in range(7):
        count = 1 + number % 3 if seen and kind != "lm" else 0
        pictures = tuple(picture(10 * number + i) for i in range(count))
        asked.append(Question("what is the total " * (number % 4) + f"red {number}", pictures))
    return asked


ANSWERS = ["yes", "the lazy dog", "no 1 2 3", "red", "green blue jumps over", "fox", "4"]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_changes_no_answer(models, kind, seen):
    model, asked = models[kind], questions(kind, seen)
    alone = [model.generate([question], 8)[0] for question in asked]
    assert model.generate(asked, 8) == alone
    assert len(set(alone)) > 3
    pairs = list(zip(asked, ANSWERS, strict=True))
    one = [model.log_likelihoods([pair])[0] for pair in pairs]
    many = model.log_likelihoods(pairs)
    assert [total for total, _ in many] == pytest.approx([total for total, _ in one], abs=1e-3)
    assert [greedy for _, greedy in many] == [greedy for _, greedy in one]


@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_answer_is_greedy(models, kind):
    """What was generated is what log-likelihood calls greedy; something else is not."""
    model, checked = models[kind], 0
    for question in questions(kind, True):
        text = model.generate([question], 2)[0]
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if text.startswith(" ") or len(ids) != 2:
            continue  # other tokens spell the same text
        assert model.log_likelihoods([(question, text)])[0][1]
        assert not model.log_likelihoods([(question, text + "q z")])[0][1]
        checked += 1
    assert checked


@torch.no_grad()
def test_nanovlm_log_likelihood_is_the_sum_over_its_tokens(models, folders):
    student = load_student(folders["nanovlm"]).eval()
    processor = load_processor(folders["nanovlm"])
    question = Question("what is it?", (picture(1), picture(2)))
    pictures = processor.pictures(question.pictures)
    prompt = processor.prompt((), question.text, [p.size for p in question.pictures]).tolist()
    answer = processor.tokenizer("lazy dog", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    logp = student.lm_head(student(ids, pictures=pictures))[0].log_softmax(-1)
    expected = sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(answer))
    # In a chat the answer has no blank before it, whether the task puts one there or not.
    for text in ("lazy dog", " lazy dog"):
        total, greedy = models["nanovlm"].log_likelihoods([(question, text)])[0]
        assert total == pytest.approx(expected, abs=1e-4)
        assert not greedy


@torch.no_grad()
@pytest.mark.parametrize("name", ["paligemma2", "gemma3", "aya-vision", "llava-granite"])
def test_logits_are_scaled_and_capped_as_the_decoders_own_class_does(name, tmp_path):
    """By a run and by lmms-eval, as in training; half of transformers' VLM classes leave it out."""
    folder = zoo.write_pair(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if "gemma" in name:  # what a small model's logits reach
        config["text_config"]["final_logit_softcapping"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))
    student, processor = formats.load_student(folder).eval(), formats.load_processor(folder)
    prompt, answer = "what is the total", " of red"
    start = len(processor.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([processor.tokenizer(prompt + answer)["input_ids"]])
    scorers = [StudentScorer(student, processor)]
    if name == "paligemma2":  # its class caps, and lets the prompt see all of itself
        own, behind = student.vlm, torch.arange(ids.shape[1]) >= start
        options = {"attention_mask": torch.ones_like(ids), "token_type_ids": behind[None].long()}
    else:
        own, options = student.causal_lm(), {}
        scorers.append(load_scorer(str(folder)))
    logp = own(ids, **options).logits[0].log_softmax(-1)
    bare = student.lm_head(own.base_model(ids, **options).last_hidden_state)[0].log_softmax(-1)
    assert (bare - logp).abs().max() > 0.1
    expected = sum(logp[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
    for scorer in scorers:
        ((total, _),) = scorer.log_likelihoods([(Question(prompt, chat=False), answer)])
        assert total == pytest.approx(expected, abs=1e-3)


def test_rotary_positions_of_several_axes_go_on_behind_the_prompt(tmp_path):
    """A run's scorer against lmms-eval's, where the model makes its positions itself."""
    folder = zoo.write_pair("qwen2-vl", tmp_path)
    processor, own = formats.load_processor(folder), load_scorer(str(folder))
    run = StudentScorer(formats.load_student(folder), processor)
    asked = ["what is it?", "what is the total red?", "why"]
    pairs = [(Question(text, (picture(len(text)),)), "the lazy dog" + text[:4]) for text in asked]
    found = run.log_likelihoods(pairs)
    expected = [own.log_likelihoods([pair])[0] for pair in pairs]
    assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("context", ["Question: the fox\nAnswer:", "the fox jumps ", ""])
def test_plain_text_is_split_as_in_the_harness(models, folders, context):
    """Context and continuation together; the context's blanks go with the continuation."""
    tokenizer = AutoTokenizer.from_pretrained(folders["lm"])
    lm = AutoModelForCausalLM.from_pretrained(folders["lm"], dtype=torch.float32).eval()
    continuation = " over the dog"
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context.rstrip())["input_ids"])
    if not start:
        whole, start = [tokenizer.bos_token_id, *whole], 1
    logp = lm(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logp[i - 1, whole[i]].item() for i in range(start, len(whole)))
    pair = (Question(context, chat=False), continuation)
    assert models["lm"].log_likelihoods([pair])[0][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_cut_the_answer(models, kind):
    model, asked = models[kind], questions(kind, True)
    full = model.generate(asked, 12)
    stops = [text[5:7] for text in full if len(text) > 8][:3]
    assert stops
    assert model.generate(asked, 12, stops) == [cut(text, stops) for text in full]
    assert cut("a\n\nb. c", [".", "\n\n"]) == "a"
    assert cut("abc", []) == "abc"


def test_a_generation_stops_as_soon_as_all_rows_have(models):
    """The stop criterion ends the loop: the model is not run to the limit."""
    model = models["nanovlm"]
    question = questions("nanovlm", True)[0]
    text = model.generate([question], 6)[0]
    calls = []
    handle = model.model.decoder.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        model.generate([question], 300, [text[0]])
    finally:
        handle.remove()
    assert len(calls) < 30


def test_a_language_model_refuses_pictures_or_drops_them(folders):
    question = Question("what is it?", (picture(0),))
    with pytest.raises(ValueError, match="cannot see"):
        load_scorer(str(folders["lm"])).generate([question], 4)
    dropping = load_scorer(str(folders["lm"]), pictures="drop")
    assert dropping.generate([question], 4) == dropping.generate([Question("what is it?")], 4)


def test_literal_image_tokens_are_no_pictures(models):
    for kind, token in (("nanovlm", "<|image|>"), ("llava", "<image>"), ("idefics3", "<image>")):
        for chat in (True, False):
            clean, dirty = (Question(text, chat=chat) for text in ("red fox", f"red {token}fox"))
            model = models[kind]
            assert model.generate([dirty], 4) == model.generate([clean], 4)
            assert model.log_likelihoods([(dirty, " dog")]) == model.log_likelihoods(
                [(clean, " dog")]
            )


def test_kinds_are_told_apart(folders, tmp_path):
    kinds = [kind_of(folders[kind]) for kind in KINDS]
    assert kinds == ["nanovlm", "lm", "vlm", "vlm"]
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        kind_of(tmp_path)
    for config, message in (
        ({}, "neither a VLM nor an LM"),
        ({"model_type": "vit"}, "neither a VLM nor an LM"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            kind_of(tmp_path)


def test_what_cannot_be_answered_is_an_error(models, folders):
    with pytest.raises(ValueError, match="no tokens"):
        models["lm"].log_likelihoods([(Question("red", chat=False), "")])
    with pytest.raises(ValueError, match="dtype"):
        load_scorer(str(folders["lm"]), dtype="float33")


@pytest.mark.parametrize("kind", ["lm", "llava"])
def test_a_model_without_all_its_weights_is_not_scored(folders, tmp_path, kind):
    shutil.copytree(folders[kind], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file({name: w for name, w in weights.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing .*layers\.0\.mlp\.up_proj\.weight"):
        load_scorer(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["nanovlm", "idefics3"])
@pytest.mark.parametrize("trained", [None, False, True])
def test_pictures_are_cut_as_the_run_cut_them(folders, tmp_path, kind, trained):
    """The same tiles and the same ids as in training, whatever the checkpoint's own default is."""
    folder = tmp_path / "run" / "student"
    shutil.copytree(folders[kind], folder)
    if trained is not None:
        (tmp_path / "run" / "recipe.yaml").write_text(f"tiling: {str(trained).lower()}\n")
    seen, question = picture(1).resize((90, 60)), "what is red?"
    for asked, expected in ((None, bool(trained)), (False, False), (True, True)):
        for name in (folder, tmp_path / "run"):
            inputs = load_scorer(str(name), tiling=asked)._prompts([Question(question, (seen,))])
            processor = formats.load_processor(folder, tiling=expected)
            tiles = processor.pictures([seen])["pixel_values"]
            assert (tiles.shape[:-3].numel() > 1) == expected
            pixels = inputs.get("pictures", inputs)["pixel_values"]
            assert torch.allclose(pixels, tiles)
            ids = processor.prompt([], question, [seen.size])
            assert inputs["input_ids"][0].tolist() == ids.tolist()


def test_the_command_takes_tiling_from_the_run(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders["idefics3"], run / "student")
    assert model_options(str(run), None, False, "auto", None) == {"dtype": "auto"}
    (run / "recipe.yaml").write_text("tiling: true\n")
    for asked, expected in ((None, True), (True, True), (False, False)):
        assert model_options(str(run), asked, False, "auto", None)["tiling"] is expected
    shutil.copytree(run / "student", run / "checkpoint-5" / "student")
    assert model_options(str(run / "checkpoint-5"), None, False, "auto", None)["tiling"] is True
    with pytest.raises(ValueError, match="is a bare LM"):
        model_options(str(folders["lm"]), True, False, "auto", None)
    with pytest.raises(ValueError, match="no image splitting"):
        load_scorer(str(folders["llava"]), tiling=True)


def test_a_vlm_takes_another_tokenizer(folders, tmp_path):
    other = AutoTokenizer.from_pretrained(folders["idefics3"])
    other.add_tokens(["lazy dog"])
    other.save_pretrained(tmp_path / "same")
    model = load_scorer(str(folders["idefics3"]), tokenizer=str(tmp_path / "same"))
    assert len(model.tokenizer) == len(other)
    assert model.generate([Question("red", (picture(1),))], 2)
    with pytest.raises(ValueError, match="gives <image> another id"):
        load_scorer(str(folders["idefics3"]), tokenizer=str(folders["lm"]))


def test_an_answer_begins_as_the_template_writes_it(folders, tmp_path):
    """``Assistant: yes``: what a SmolVLM was trained on, not ``Assistant:yes``."""
    from hf_pairs import SMOLVLM_TEMPLATE

    template = tmp_path / "template.jinja"
    template.write_text(SMOLVLM_TEMPLATE, encoding="utf-8")
    assert load_scorer(str(folders["idefics3"])).answer_prefix == ""
    model = load_scorer(str(folders["idefics3"]), chat_template=str(template))
    assert model.answer_prefix == " "
    question = Question("what is red?", (picture(1),))
    for continuation in ("the dog", " the dog"):
        _, ids = model._split(question, continuation)
        assert model.tokenizer.decode(ids) == " the dog"
