"""`ldistill merge`: between a student's decoder and the language model it was built on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.models.formats import load_student
from ldistill.models.pair import load_pair
from ldistill.tools.merge import merge


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_student(folder).named_parameters())


def merged(root: Path, out: Path, weight: float, **options) -> dict[str, torch.Tensor]:
    merge(str(root / "student"), str(root / "teacher"), out, weight, **options)
    return weights(out)


def test_weight_0_gives_the_students_bytes(pair_root, tmp_path):
    merged(pair_root, tmp_path / "out", 0.0)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (pair_root / "student" / name).read_bytes()


def test_weight_1_gives_the_lms_decoder_and_the_students_everything_else(pair_root, tmp_path):
    new, old = merged(pair_root, tmp_path / "out", 1.0), weights(pair_root / "student")
    lm = load_file(pair_root / "teacher" / "model.safetensors")
    decoder = {f"decoder.{name}": weight for name, weight in lm.items()}
    assert len(decoder) > 10
    for name, weight in decoder.items():
        assert torch.equal(new[name][: len(weight)], weight.float()), name
        assert torch.equal(new[name][len(weight) :], old[name][len(weight) :]), name
    rest = new.keys() - decoder.keys() - {"decoder.lm_head.weight"}
    assert any(name.startswith("projector") for name in rest)
    for name in rest:
        assert torch.equal(new[name], old[name]), name
    pair = load_pair(str(tmp_path / "out"), str(pair_root / "teacher"))
    assert pair.student.lm_head is not None


def test_weights_lie_between_grow_with_depth_and_stay_in_layers(pair_root, tmp_path):
    old = weights(pair_root / "student")
    lm = load_file(pair_root / "teacher" / "model.safetensors")
    layers = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    names = ["model.embed_tokens.weight", *layers]

    def share(new: dict[str, torch.Tensor], name: str) -> float:
        mine, theirs = old[f"decoder.{name}"], lm[name].float()
        mine, mixed = mine[: len(theirs)], new[f"decoder.{name}"][: len(theirs)]
        return ((mixed - mine).norm() / (theirs - mine).norm()).item()

    even = merged(pair_root, tmp_path / "even", 0.25)
    assert [share(even, name) for name in names] == pytest.approx([0.25] * 3, abs=1e-5)
    count = 1 + max(int(n.split(".")[2]) for n in lm if ".layers." in n)
    growing = merged(pair_root, tmp_path / "growing", 0.5, growing=True)
    wanted = [0, 0.5 / (count + 1), 1.0 / (count + 1)]
    assert [share(growing, name) for name in names] == pytest.approx(wanted, abs=1e-5)
    one = merged(pair_root, tmp_path / "one", 1.0, layers="1-1")
    assert [share(one, name) for name in names] == pytest.approx([0, 0, 1], abs=1e-5)


def test_the_command_sweeps_and_refuses(pair_root, tmp_path):
    pair = ["--student", str(pair_root / "student"), "--lm", str(pair_root / "teacher")]
    out = ["--out", str(tmp_path / "sweep")]
    done = CliRunner().invoke(app, ["merge", *pair, *out, "--weights", "0.1,0.2"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"weight-0.1", "weight-0.2"}
    for arguments, message in (
        ([*pair, *out], "give --weight or --weights"),
        ([*pair, *out, "--weights", "0.1"], "exists: choose another --out"),
        ([*pair, "--out", str(tmp_path / "x"), "--weight", "2"], "a weight is from 0 to 1"),
        ([*pair, "--out", str(tmp_path / "x"), "--weight", "1", "--layers", "2"], "FIRST-LAST"),
    ):
        refused = CliRunner().invoke(app, ["merge", *arguments])
        assert isinstance(refused.exception, ValueError)
        assert message in str(refused.exception)
    assert not (tmp_path / "x").exists()
