"""OCRBench regrouped from samples, against the totals of the paper's Table 6."""

from __future__ import annotations

import pytest
from eval_results import TABLE_6, ocrbench_sample, ocrbench_samples, write_results

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.results import read_variants


def counts_of(tmp_path, lines):
    write_results(tmp_path, {"ocrbench": {"ocrbench_accuracy,none": 0.6}}, {"ocrbench": lines})
    (variant,) = read_variants([f"v={tmp_path}"])
    return ocrbench.count(variant.tasks["ocrbench"].samples().values())


def test_table_6(tmp_path):
    ours = counts_of(tmp_path / "lingudistill", ocrbench_samples(1))
    full = counts_of(tmp_path / "nanovlm-full", ocrbench_samples(2))
    assert len(ours) == 10
    assert {kind: c.right for kind, c in ours.items()} == {k: v[1] for k, v in TABLE_6.items()}
    for counts, subtotals, total in (
        (ours, (133, 153, 140, 84 + 90), 600),
        (full, (137, 176, 150, 147 + 116), 726),
    ):
        groups = [ocrbench.total(counts, kinds) for kinds in ocrbench.GROUPS.values()]
        assert tuple(c.right for c in groups) == subtotals
        assert tuple(c.of for c in groups) == (150, 250, 200, 400)
        assert ocrbench.total(counts) == ocrbench.Count(total, 1000)


def test_where_the_paper_lost(tmp_path):
    """89 of 126 points (71%) in layout extraction, 99 (79%) with text in scenes."""
    ours = counts_of(tmp_path / "a", ocrbench_samples(1))
    full = counts_of(tmp_path / "b", ocrbench_samples(2))
    shares = ocrbench.losses(full, ours)
    assert shares["Layout extraction"] == (-89, pytest.approx(89 / 126))
    assert f"{shares['Layout extraction'][1]:.0%}" == "71%"
    with_scenes = shares["Layout extraction"][0] + shares["Scene text VQA"][0]
    assert f"{with_scenes / -126:.0%}" == "79%"
    assert sum(change for change, _ in shares.values()) == -126


def test_groups_cover_lmms_evals_sub_tasks():
    assert list(TABLE_6) == ocrbench.KINDS
    assert sum(samples for samples, *_ in TABLE_6.values()) == 1000


def test_a_part_is_a_part(tmp_path):
    lines = [ocrbench_sample(0, "Digit String Recognition", ["12"], "12", True)]
    counts = counts_of(tmp_path, lines)
    assert counts == {"Digit String Recognition": ocrbench.Count(1, 1)}


def test_unknown_sub_task(tmp_path):
    with pytest.raises(ValueError, match="no known sub-task"):
        counts_of(tmp_path, [ocrbench_sample(0, "Emoji", ["x"], "x", True)])
