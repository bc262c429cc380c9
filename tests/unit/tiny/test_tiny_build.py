"""Building the tiny pair at reduced length, and preparing its data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.data.index import ShardIndex
from ldistill.evaluation.items import load_items
from ldistill.models.formats import load_processor
from ldistill.models.pair import load_pair
from ldistill.models.processor import Document
from ldistill.tiny import prepare as preparing
from ldistill.tiny.benchmark import TASKS
from ldistill.tiny.build import build_pair
from ldistill.tiny.prepare import STUDENT, TEACHER, prepare
from ldistill.tiny.scenes import SOURCES
from ldistill.tiny.training import Phase, batches

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
    teacher, student = pair.lm.state_dict(), pair.student.decoder.state_dict()
    assert set(files(built / "student")) == {"config.json", "model.safetensors"}
    for name, weight in teacher.items():
        assert torch.equal(student[name][: weight.shape[0]], weight.float()), name


def test_batches_keep_every_document():
    made = [Document(np.zeros(n % 7), np.zeros(n % 7)) for n in range(64)]
    cut = list(batches(((document, None) for document in made), 2))
    assert sorted(id(d) for batch in cut for d, _ in batch) == sorted(map(id, made))
    assert all(len(batch) == 2 for batch in cut)


def test_a_phase_warms_up_and_cools_down():
    phase = Phase("a phase", steps=1000, batch_size=1, rate=1.0)
    assert phase.rate_at(0) < 0.02
    assert phase.rate_at(100) > 0.95
    assert phase.rate_at(999) < 0.04
    assert phase.scaled(0.5).steps == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps-scale", "0"], "Invalid value for"), ([], "exists")],
)
def test_the_command_refuses_bad_input(tmp_path, arguments, message):
    (tmp_path / "teacher").mkdir()
    arguments = ["tiny", "build", "--out", str(tmp_path), *arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert message in (result.output or str(result.exception))


def test_prepared_data_is_made_once(built, processor, tmp_path, monkeypatch):
    options = {"samples_per_source": 4, "items_per_task": 2, "show_progress": False}
    made = prepare(tmp_path, processor=processor, **options)
    assert set(ShardIndex.load(made.shards).sources) == set(SOURCES)
    assert len(ShardIndex.load(made.shards).samples) == 4 * len(SOURCES)
    assert len(load_items(made.items)) == 2 * len(TASKS)
    monkeypatch.setattr(preparing, "build_shards", lambda *_: pytest.fail("built again"))
    assert prepare(tmp_path, processor=processor, **options) == made


def test_another_seed_has_data_of_its_own(built, processor, tmp_path):
    options = {"samples_per_source": 1, "items_per_task": 1, "show_progress": False}
    one = prepare(tmp_path, processor=processor, **options)
    two = prepare(tmp_path, processor=processor, seed=8, **options)
    assert one.items.read_bytes() != two.items.read_bytes()
    more = prepare(tmp_path, processor=processor, texts=8, **options)
    index = ShardIndex.load(more.shards, ["text"])
    assert (len(index.samples), index.categories) == (8, ["language"])
    assert more.items.read_bytes() == one.items.read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_shipped_pair_loads_and_fits():
    pair = load_pair(STUDENT, TEACHER)
    assert sum(p.numel() for p in pair.student.parameters()) < 2_000_000
    sizes = [p.stat().st_size for p in pair.student_folder.parent.rglob("*") if p.is_file()]
    assert sum(sizes) < 12_000_000
