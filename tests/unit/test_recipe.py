"""Recipes: the paper's Table 2, overrides, refusals; the 17 sources and their weights."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ldistill.recipe import OWN, load_recipe, parse, print_help, shipped_recipes
from ldistill.recipe_values import HEEDED, check_deepspeed, check_trainer_flags
from ldistill.sources import (
    DOCUMENT,
    LANGUAGE,
    SourceWeights,
    by_source,
    category_of,
    normalise,
    parse_extra,
    resolve_sources,
)
from ldistill.training.run_folder import plain

# name: (sources, distil, α, τ), from the paper's Table 2
TABLE_2 = {
    "nanovlm-full": ("full", "none", None, None),
    "nanovlm-lang": ("lang", "none", None, None),
    "distill-full": ("full", "all", 0.5, 2),
    "distill-lang": ("lang", "all", 0.5, 2),
    "lingudistill": ("full", "language", 0.7, 4),
    "lingudistill-highkd": ("full", "language", 0.9, 4),
    "lingudistill-lowkd": ("full", "language", 0.3, 2),
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TABLE_2)
def test_recipes_are_the_papers(name):
    recipe = parse(["--recipe", name])
    sources, distil, alpha, temperature = TABLE_2[name]
    assert recipe.data.sources == sources
    weights = SourceWeights.build(
        resolve_sources(recipe.data.sources),
        distil=recipe.distil.distil,
        alpha=recipe.distil.alpha,
        temperature=recipe.distil.temperature,
    )
    assert len(weights.names) == (17 if sources == "full" else 8)
    distils = {n for n, a in zip(weights.names, weights.alpha) if a > 0}
    expected = {"none": set(), "all": set(weights.names), "language": set(LANGUAGE)}[distil]
    assert distils == expected
    if alpha is not None:
        assert {a for a in weights.alpha if a} == {alpha}
        assert set(weights.temperature) == {temperature}


@pytest.mark.parametrize("name", TABLE_2)
def test_shared_settings_are_the_papers_table_4(name, monkeypatch):
    monkeypatch.setattr("ldistill.recipe.has_fast_bf16", lambda: True)
    recipe = parse(["--recipe", name])
    args = recipe.training
    assert recipe.pair.student == "lusxvr/nanoVLM-460M-8k"
    assert recipe.pair.teacher == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert (args.max_steps, args.learning_rate, args.max_grad_norm) == (4000, 1e-4, 1.0)
    assert args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(4000) == 120
    assert args.bf16
    assert recipe.data.max_length == 1024
    assert recipe.run.global_batch_size == 128
    assert not recipe.data.tiling


def test_shared_settings_stand_once():
    shared = set(
        yaml.safe_load(shipped_recipes()["lingudistill"].with_name("_shared.yaml").read_text())
    )
    for name in TABLE_2:
        own = set(yaml.safe_load(shipped_recipes()[name].read_text()))
        assert own & shared <= {"sources"}, name
        assert len(own) <= 4


def test_the_default_is_tiny():
    assert parse([]).run.recipe == "tiny"
    assert "tiny" in shipped_recipes()


def test_command_line_overrides_the_recipe():
    flags = ["--alpha", "0.2", "--max_steps=7", "--learning_rate", "3e-5"]
    more = ["--weight_decay", "0.05", "--extra_sources", "a=document"]
    recipe = parse(["--local_rank=0", "--recipe=lingudistill", *flags, *more])
    assert (recipe.distil.alpha, recipe.distil.temperature) == (0.2, 4.0)
    assert recipe.training.max_steps == 7
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (3e-5, 0.05)
    assert recipe.data.extra_sources == ["a=document"]
    resolved = recipe.as_dict()
    assert resolved["alpha"] == 0.2
    assert resolved["weight_decay"] == 0.05
    assert resolved["warmup_steps"] == 0.03


def test_own_recipe_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("alpha: 0.4\nstudent: somewhere\nmax_steps: 5\n")
    recipe = parse(["--recipe", str(tmp_path / "mine.yaml")])
    assert (recipe.distil.alpha, recipe.pair.student) == (0.4, "somewhere")


def sizes(argv: list[str], ranks: int, monkeypatch) -> tuple[int, int, int]:
    """Rows of a pass, passes and rows of a step of a command line on so many ranks."""
    monkeypatch.setattr("ldistill.recipe.world_size", lambda: ranks)
    recipe = parse(argv)
    args = recipe.training
    found = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert recipe.run.global_batch_size == found[0] * found[1] * ranks
    return (*found, recipe.run.global_batch_size)


def test_gradient_accumulation_follows_the_global_batch(monkeypatch):
    lingudistill = ["--recipe", "lingudistill"]
    rows = ["--per_device_train_batch_size", "8"]
    assert sizes([*lingudistill, *rows], 4, monkeypatch) == (8, 4, 128)
    steps = ["--gradient_accumulation_steps", "2"]
    assert sizes([*lingudistill, *steps], 4, monkeypatch) == (8, 2, 64)


@pytest.mark.parametrize("name", [*TABLE_2, "tiny"])
def test_sizes_of_a_recipe_give_way_to_the_ranks(name, monkeypatch):
    """Exactly the recipe's step wherever the ranks divide it, and near it elsewhere."""
    total, most = (16, 16) if name == "tiny" else (128, 8)
    for ranks in (1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 200, 1000):
        rows, _, got = sizes(["--recipe", name], ranks, monkeypatch)
        assert 1 <= rows <= most
        if total % ranks == 0:
            assert got == total, ranks
        elif ranks > total:
            assert got == ranks
        else:
            assert abs(got - total) <= total / 3, ranks
    assert sizes(["--recipe", name], 2, monkeypatch)[0] == 8


def test_where_a_recipe_gave_way_one_line_says_so(monkeypatch):
    monkeypatch.setattr("ldistill.recipe.has_fast_bf16", lambda: True)
    monkeypatch.setattr("ldistill.recipe.world_size", lambda: 2)
    [line] = parse([]).notes
    assert "8 rows a pass instead of the recipe's 16" in line
    assert parse(["--recipe", "lingudistill"]).notes == []
    assert parse(["--per_device_train_batch_size", "4"]).notes == []
    monkeypatch.setattr("ldistill.recipe.world_size", lambda: 24)
    [line] = parse(["--recipe", "lingudistill"]).notes
    assert "120 rows instead of the recipe's 128: 5 a pass × 1 passes × 24 ranks" in line


@pytest.mark.parametrize(("typed", "ranks", "expected"), [
    ({"per_device_train_batch_size": 5}, 4, (5, 6, 120)),
    ({"per_device_train_batch_size": 16}, 32, (16, 1, 512)),
    ({"global_batch_size": 4}, 2, (2, 1, 4)),
    ({"global_batch_size": 30}, 2, (5, 3, 30)),
    ({"global_batch_size": 64, "gradient_accumulation_steps": 2}, 4, (8, 2, 64)),
    ({"global_batch_size": 256, "gradient_accumulation_steps": 2}, 4, (32, 2, 256)),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 4, (2, 3, 24)),
    ({"global_batch_size": 128, "per_device_train_batch_size": 5}, 4, "128 .*5 rows × 4 ranks"),
    ({"global_batch_size": 16}, 3, "global_batch_size 16 is no multiple of 3 ranks"),
    ({"global_batch_size": 4}, 8, "no multiple of 8 ranks"),
    ({"global_batch_size": 12, "gradient_accumulation_steps": 5}, 2, "5 accumulation steps × 2"),
    ({"global_batch_size": 16, "per_device_train_batch_size": 2,
      "gradient_accumulation_steps": 2}, 2, "16 is not 2 rows × 2 accumulation steps × 2 ranks"),
    ({"per_device_train_batch_size": 0}, 1, "at least 1"),
])  # fmt: skip
def test_sizes_that_were_typed_stay(typed, ranks, expected, monkeypatch):
    argv = ["--recipe", "lingudistill", *(f"--{name}={size}" for name, size in typed.items())]
    if isinstance(expected, tuple):
        assert sizes(argv, ranks, monkeypatch) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            sizes(argv, ranks, monkeypatch)


def test_deepspeed_learns_the_accumulation(monkeypatch):
    """transformers fills its configuration while the arguments are made, not after."""
    config = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
    recipe = parse(["--deepspeed", str(config), "--recipe", "lingudistill",
                    "--per_device_train_batch_size", "8"])  # fmt: skip
    config = recipe.training.hf_deepspeed_config.config
    steps = recipe.training.gradient_accumulation_steps
    assert config["gradient_accumulation_steps"] == steps == 16
    assert config["train_batch_size"] == recipe.run.global_batch_size == 128


@pytest.mark.parametrize(("argv", "message"), [
    (["--recipe", "lingudistil"], "Did you mean 'lingudistill'"),
    (["--recipe", "no/such.yaml"], "no recipe"),
    (["--alhpa", "0.5"], "Did you mean --alpha"),
    (["--recipe", "lingudistill", "--kl", "sideways"], "kl must be one of"),
    (["--recipe", "lingudistill", "--attention", "magic"], "attention must be one of"),
    (["--recipe", "lingudistill", "--on_long", "ignore"], "on_long must be one of"),
    (["--recipe", "lingudistill", "--max_length", "0"], "max_length"),
    (["--alpha", "abc"], "^alpha 'abc': write a number, source=number"),
    (["--label_smoothing_factor", "0.1"], "label_smoothing_factor cannot be used"),
    (["--neftune_noise_alpha", "5"], "neftune_noise_alpha cannot be used"),
    (["--use_liger_kernel", "true"], "--kernels"),
    (["--report_to", "nowhere"], "report_to nowhere: its package is not installed"),
    (["--recipe", "lingudistill", "--kv_grad", "through", "--gradient_checkpointing"], "kv_grad"),
    (["--auto_find_batch_size", "true"], "ldistill plan"),
    (["--train_sampling_strategy", "group_by_length"], "in the order of --seed or --data_seed"),
    (["--ignore_data_skip"], "reads on exactly where it stopped"),
    (["--average_tokens_across_devices", "false"], "counts the rows of all ranks"),
    (["--hub_token", "hf_secret"], "HF_TOKEN"),
    (["--hub_model_id", "me/mine"], "add --push_to_hub"),
    (["--bf16_full_eval", "true"], "--eval_items and --eval_suite"),
    (["--load_best_model_at_end", "true"], "takes the checkpoint that was evaluated best"),
    (["--fsdp", "full_shard"], "--deepspeed"),
    (["--eval_strategy", "steps", "--eval_steps", "5"], "needs something to evaluate on"),
    (["--eval_strategy", "epoch", "--eval_suite", "tiny"], "must be steps or no, got 'epoch'"),
    (["--logging_strategy", "epoch"], "must be steps or no, got 'epoch'"),
    (["--save_only_model", "true"], "no run can go on"),
    (["--save_strategy", "epoch"], "save_strategy must be steps or no, got 'epoch'"),
    (["--save_strategy", "best", "--metric_for_best_model", "x"], "got 'best'"),
    (["--train", "projector,eyes"], "train takes vision, projector, decoder.*got 'projector,eyes'"),
    (["--vision_lr", "1e-5"], "vision does not train: --train vision,..."),
    (["--train", "projector", "--lora_rank", "4"], "nothing of the decoder trains"),
])  # fmt: skip
def test_refusals(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(argv)


def test_evaluation_goes_with_the_checkpoints_unless_told():
    argv = ["--eval_suite", "tiny", "--save_steps", "50"]
    assert parse(argv).training.eval_steps == 50
    assert parse([*argv, "--eval_steps", "7"]).training.eval_steps == 7


@pytest.mark.parametrize("everything", [False, True])
def test_help_names_every_flag_of_ours(everything, capsys):
    print_help(everything)
    told = capsys.readouterr().out
    names = [f.name for group in OWN for f in dataclasses.fields(group)]
    assert [name for name in names if f"--{name}" not in told] == []
    assert ("--weight_decay" in told) == everything


def test_every_flag_of_the_trainer_is_heeded_or_refused():
    """A field of a newer transformers is refused until somebody has looked at it."""
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    unread = known - HEEDED
    assert len(unread) > 30
    defaults = HfArgumentParser(TrainingArguments).parse_known_args([])[0]
    for name in unread & set(vars(defaults)):
        changed = Namespace(**(vars(defaults) | {name: "something else"}))
        with pytest.raises(ValueError, match=f"{name} cannot be used here"):
            check_trainer_flags(changed, defaults)
    check_trainer_flags(defaults, defaults)


def test_bf16_of_a_recipe_gives_way_on_a_cpu_that_is_slow_at_it(monkeypatch):
    monkeypatch.setattr("ldistill.recipe.has_fast_bf16", lambda: False)
    recipe = parse(["--recipe", "lingudistill"])
    assert not recipe.training.bf16
    assert ["fp32 instead of the recipe's bf16" in note for note in recipe.notes] == [True]
    typed = parse(["--recipe", "lingudistill", "--bf16", "true"])
    assert (typed.training.bf16, typed.notes) == (True, [])
    assert parse([]).notes == []
    monkeypatch.setattr("ldistill.recipe.has_fast_bf16", lambda: True)
    assert parse(["--recipe", "lingudistill"]).training.bf16


def test_torch_compile_compiles_the_blocks():
    """transformers would have accelerate compile the whole module, by its environment too."""
    recipe = parse(["--torch_compile_backend", "eager"])
    assert recipe.pair.compile_blocks
    assert recipe.compile_options == {"backend": "eager", "mode": None}
    assert not recipe.training.torch_compile
    assert not [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]
    assert not parse([]).pair.compile_blocks


def test_unknown_recipe_field(tmp_path):
    (tmp_path / "bad.yaml").write_text("temprature: 2\n")
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(("text", "message"), [
    ("alpha:", "alpha is empty"),
    ("alpha: high", "alpha 'high': write a number"),
    ("alpha: true", "alpha must be a number, or numbers by source, got True"),
    ("max_length: 512.5", "max_length must be a whole number"),
    ("packing: 1", "packing must be true or false"),
    ("kv_scope: [full]", "kv_scope must be text"),
    ("kl: sideways", "kl must be one of forward, reverse, jsd, got 'sideways'"),
    ("sources: [docvqa, 3]", "sources must be text"),
    ("extra_sources: {a: document}", "extra_sources must be a list"),
    ("max_steps:", "max_steps is empty"),
])  # fmt: skip
def test_a_value_that_its_field_cannot_have_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        parse(["--recipe", str(tmp_path / "bad.yaml")])


def test_a_recipe_says_names_as_a_list_or_as_text(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "sources: [docvqa, 'a(b,c)']\ndistil: [docvqa]\nextra_sources: a(b,c)=document\n"
        "tokenizer:\nalpha: 1\nlearning_rate: 1e-5\n"
    )
    recipe = parse(["--recipe", str(tmp_path / "mine.yaml")])
    assert (recipe.data.sources, recipe.distil.distil) == ("docvqa,a(b,c)", "docvqa")
    assert recipe.data.extra_sources == ["a(b,c)=document"]
    assert (recipe.distil.alpha, recipe.training.learning_rate) == (1, 1e-5)
    assert recipe.pair.tokenizer is None


def test_epochs_replace_the_steps_of_a_recipe_unless_both_are_said(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("num_train_epochs: 2\n")
    flags = ["--num_train_epochs", "3"]
    assert parse(flags).training.max_steps == -1
    assert parse([*flags, "--max_steps", "5"]).training.max_steps == 5
    assert parse(["--recipe", str(mine)]).training.max_steps == -1
    mine.write_text("num_train_epochs: 2\nmax_steps: 7\n")
    assert parse(["--recipe", str(mine)]).training.max_steps == 7
    assert parse(["--recipe", str(mine), *flags]).training.max_steps == -1


def test_a_deepspeed_file_is_read_before_anything_else(tmp_path):
    path = tmp_path / "mine.json"
    flags = ["--deepspeed", str(path)]
    for text, message in (
        ("{,", r"mine\.json is not valid JSON"),
        ("[]", r"mine\.json must be a JSON object"),
        ('{"optimizer": {"type": "AdamW"}}', r"mine\.json has its own optimizer.*--projector_lr"),
        ('{"scheduler": {}, "optimizer": {}}', "its own optimizer and scheduler"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(flags)
    for text, message in (("{,", "is not valid"), ('{"optimizer": {}}', "has its own")):
        with pytest.raises(ValueError, match=f"on the command line.*{message}"):
            parse(["--deepspeed", text])
    with pytest.raises(ValueError, match="of the recipe has its own scheduler"):
        check_deepspeed({"scheduler": {}})
    for shipped in (Path(__file__).parents[2] / "ds_configs").glob("*.json"):
        check_deepspeed(str(shipped))


def test_sources_are_the_papers_table_5():
    assert len(LANGUAGE) == 8
    assert len(DOCUMENT) == 9
    assert category_of("robut_sqa") == "language"
    assert category_of("textcaps") == "document"
    with pytest.raises(ValueError, match="Did you mean 'docvqa'"):
        category_of("docvqua")
    with pytest.raises(ValueError, match="Known sources: aokvqa"):
        category_of("zzz")
    assert normalise(" Robut  SQA/x-y ") == "robut_sqa_x_y"


def test_extra_sources():
    extra = parse_extra(["receipts=document", "My Poems = language"])
    assert extra == {"receipts": "document", "my_poems": "language"}
    assert "receipts" in resolve_sources("full", extra)
    assert "receipts" not in resolve_sources("lang", extra)
    for bad in ("receipts", "receipts=ocr", "=language", "docvqa=language"):
        with pytest.raises(ValueError, match="extra source"):
            parse_extra([bad])


def test_weights_refuse_nonsense():
    for name, value in [
        ("alpha", "1.2"),
        ("alpha", "vsr=-0.1"),
        ("alpha", "nan"),
        ("temperature", 0),
    ]:
        with pytest.raises(ValueError, match=f"{name} must"):
            by_source(name, value, 0.5)
    named = SourceWeights.build(
        ["vqav2", "docvqa", "vsr"], distil="vsr,docvqa", alpha=0.5, temperature=2.0
    )
    assert named.alpha == (0.0, 0.5, 0.5)


def test_weights_by_source(tmp_path):
    """What is named counts over the rest, and the rest stays what the recipe says."""
    recipe = parse(["--recipe", "lingudistill", "--alpha", "vqav2=0.9,docvqa=0.3,VSR=0"])
    assert recipe.distil.alpha == {"others": 0.7, "vqav2": 0.9, "docvqa": 0.3, "vsr": 0}
    (tmp_path / "own.yaml").write_text(
        "alpha: {others: 0.4, vsr: 0.6}\ntemperature: {iconqa: 2}\nmix: {vsr: 2, iconqa: 25%}\n"
    )
    own = parse(["--recipe", str(tmp_path / "own.yaml")])
    assert own.distil.alpha == {"others": 0.4, "vsr": 0.6}
    assert own.distil.temperature == {"others": 4.0, "iconqa": 2.0}
    assert own.data.mix == "vsr=2,iconqa=25%"
    typed = parse(["--recipe", str(tmp_path / "own.yaml"), "--alpha", "iconqa=1", "--mix", "vsr=3"])
    assert (typed.distil.alpha, typed.data.mix) == ({"others": 0.4, "iconqa": 1.0}, "vsr=3")
    again = yaml.safe_load(yaml.safe_dump(plain(own.as_dict())))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({k: again[k] for k in ("alpha", "mix")}))
    assert parse(["--recipe", str(tmp_path / "again.yaml")]).distil.alpha == own.distil.alpha

    names = ["vqav2", "docvqa", "vsr", "iconqa", "chartqa"]
    options = {"alpha": recipe.distil.alpha, "temperature": own.distil.temperature}
    weights = SourceWeights.build(names, distil="language", **options)
    assert weights.alpha == (0.9, 0.3, 0.0, 0.7, 0.0), (
        "document sources distil where they are named"
    )
    assert weights.temperature == (4.0, 4.0, 4.0, 2.0, 4.0)
    assert not SourceWeights.build(names, distil="none", **options).distils
    with pytest.raises(ValueError, match="alpha names vqav2, which this run does not train on"):
        SourceWeights.build(names[1:], distil="language", **options)


@pytest.mark.parametrize("text", ["mix: 2", "mix: [vsr, 2]", "mix: {vsr: true}", "mix: convex"])
def test_a_mixture_in_a_recipe_that_is_none(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match="mix"):
        parse(["--recipe", str(tmp_path / "own.yaml")])


def test_sources_that_are_to_distil_must_be_in_the_run():
    options = {"alpha": 0.5, "temperature": 2.0}
    with pytest.raises(ValueError, match="distil names vqav2, which this run does not train on"):
        SourceWeights.build(["docvqa", "vsr"], distil="vqav2,vsr", **options)
    for kind in ("language", "all", "lang"):
        assert SourceWeights.build(["docvqa", "vsr"], distil=kind, **options).distils


def test_a_comma_inside_parentheses_is_part_of_a_source_name():
    name = "figureqa(cauldron,llava_format)"
    extra = parse_extra([f"{name}=language"])
    assert resolve_sources(f"docvqa, {name},vsr", extra) == ["docvqa", name, "vsr"]
