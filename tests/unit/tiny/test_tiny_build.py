"""Building the tiny pair at reduced length, and preparing its data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldistill.data.index import ShardIndex
from ldistill.evaluation.items import load_items
from ldistill.models.nanovlm_format import load_processor
from ldistill.models.pair import load_pair
from ldistill.tiny import prepare as preparing
from ldistill.tiny.benchmark import TASKS
from ldistill.tiny.build import build_pair
from ldistill.tiny.commands import app
from ldistill.tiny.prepare import STUDENT, TEACHER, prepare
from ldistill.tiny.scenes import SOURCES, captioned
from ldistill.tiny.training import Phase, batches, encode_chat
from ldistill.tiny.world import World

SCALE = 0.001


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build_pair(out, steps_scale=SCALE, show_progress=False)
    return out


@pytest.fixture(scope="module")
def processor(built):
    return load_processor(built / "student", str(built / "teacher"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(built, tmp_path):
    torch.rand(7)
    build_pair(tmp_path, steps_scale=SCALE, show_progress=False)
    for part in ("teacher", "student"):
        assert files(tmp_path / part) == files(built / part)


def test_the_student_is_the_teacher_plus_image_tokens(built):
    pair = load_pair(
        str(built / "student"), str(built / "teacher"), tokenizer=str(built / "teacher")
    )
    teacher, student = pair.teacher.lm.state_dict(), pair.student.decoder.state_dict()
    assert set(files(built / "student")) == {"config.json", "model.safetensors"}
    for name, weight in teacher.items():
        assert torch.equal(student[name][: weight.shape[0]], weight.float()), name


def test_chats_are_encoded_as_the_processor_does(processor):
    for source in SOURCES:
        turns = captioned(World(), source, 0).turns
        ids, labels = encode_chat(processor.tokenizer, turns, processor.image_text([(1, 1)]))
        expected = processor.encode(turns, [(1, 1)])
        assert ids.tolist() == expected.input_ids.tolist()
        assert labels.tolist() == expected.labels.tolist()


def test_batches_keep_every_document():
    made = list(batches(iter(range(64)), 2, lambda n: n % 7))
    assert sorted(n for batch in made for n in batch) == list(range(64))
    assert all(len(batch) == 2 for batch in made)


def test_a_phase_warms_up_and_cools_down():
    phase = Phase(steps=1000, batch_size=1, rate=1.0)
    assert phase.rate_at(0) < 0.02
    assert phase.rate_at(100) > 0.95
    assert phase.rate_at(999) < 0.04
    assert phase.scaled(0.5).steps == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps-scale", "0"], "above 0"), ([], "exists")],
)
def test_the_command_refuses_bad_input(tmp_path, arguments, message):
    (tmp_path / "teacher").mkdir()
    result = CliRunner().invoke(app, ["build", "--out", str(tmp_path), *arguments])
    assert result.exit_code != 0
    assert message in result.output


def test_prepared_data_is_made_once(built, processor, tmp_path, monkeypatch):
    options = {"samples_per_source": 4, "items_per_task": 2, "show_progress": False}
    made = prepare(tmp_path, processor=processor, **options)
    assert set(ShardIndex.load(made.shards).sources) == set(SOURCES)
    assert len(ShardIndex.load(made.shards).samples) == 4 * len(SOURCES)
    assert len(load_items(made.items)) == 2 * len(TASKS)
    monkeypatch.setattr(preparing, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(tmp_path, processor=processor, **options) == made


def test_another_seed_has_data_of_its_own(built, processor, tmp_path):
    options = {"samples_per_source": 1, "items_per_task": 1, "show_progress": False}
    one = prepare(tmp_path, processor=processor, **options)
    two = prepare(tmp_path, processor=processor, seed=8, **options)
    assert one.items.read_bytes() != two.items.read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_shipped_pair_loads_and_fits():
    pair = load_pair(STUDENT, TEACHER)
    assert sum(p.numel() for p in pair.student.parameters()) < 2_000_000
    sizes = [p.stat().st_size for p in pair.student_folder.parent.rglob("*") if p.is_file()]
    assert sum(sizes) < 12_000_000
