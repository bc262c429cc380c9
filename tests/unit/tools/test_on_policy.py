"""On-policy distillation through TRL: the student comes back whole, its decoder another one."""

from __future__ import annotations

import sys

import pytest
import torch

from ldistill.models.formats import load_student


def test_the_decoder_is_trained_and_put_back(tmp_path, pair_root, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra: pip install ldistill[trl]")
    from ldistill.tools.study.on_policy import main

    student, lm = str(pair_root / "student"), str(pair_root / "teacher")
    flags = ["--student", student, "--lm", lm, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["on_policy", *flags, "--steps", "2", "--batch", "4"])
    main()
    before, after = load_student(pair_root / "student"), load_student(tmp_path / "out")
    moved = {
        name
        for name, parameter in after.named_parameters()
        if not torch.equal(parameter, before.get_parameter(name))
    }
    assert any(".self_attn." in name for name in moved)
    assert all(name.startswith("decoder.") for name in moved)
    table, old = (s.decoder.get_input_embeddings().weight for s in (after, before))
    added = after.base_vocab_size
    assert torch.equal(table[added:], old[added:])
