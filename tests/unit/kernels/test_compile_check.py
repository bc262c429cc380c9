"""compile_check on a machine without a GPU: what passes, and what it must report."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldistill_kernels import compile_check
from ldistill_kernels.shared_kv_attention import configs

ROOT = Path(__file__).parents[3]
# A child process: this one may have the interpreter on, which replaces the compiler.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
SCRIPT = """
import dataclasses, json, sys
from ldistill_kernels.compile_check import compile_case, shipped_cases
case = next(c for c in shipped_cases() if c.name.startswith("attention forward bf16 D64 plain"))
tiles = {"BLOCK_M": 128, "BLOCK_N": 128}
large = dataclasses.replace(case, constants=case.constants | tiles, num_warps=4, num_stages=4)
crooked = dataclasses.replace(case, constants=case.constants | {"D1": 48})
cases = {"shipped": (case, case.archs[0]), "large": (large, 86), "crooked": (crooked, 90)}
json.dump({n: dataclasses.asdict(compile_case(*c)) | {"problem": compile_case(*c).problem}
           for n, c in cases.items()}, sys.stdout)
"""

PTX = """
import sys
from ldistill_kernels.compile_check import build, shipped_cases
print(build(next(c for c in shipped_cases() if c.name == sys.argv[1]), 90).asm["ptx"])
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def test_command_prints_a_table_and_exits_with_0_when_all_is_well():
    module = "ldistill_kernels.compile_check"
    only = "prepare bf16 D64 plain tiles"
    done = run("-m", module, "--arch", "90", "--only", only, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "sm_90" in done.stdout
    assert "1 compiled, 0 with a problem" in done.stdout


def test_spills_large_tiles_and_compiler_errors_are_problems():
    done = run("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shipped"]["problem"] == ""
    assert found["shipped"]["registers"] > 0
    assert found["large"]["spilled"] > 0
    assert found["large"]["problem"].startswith("spills")
    assert "power of 2" in found["crooked"]["problem"]


def test_the_row_kernel_of_the_loss_loads_and_stores_vectors():
    """Bound by memory: without a hint that the compiler heeds, every access is a single element."""
    done = run("-c", PTX, "loss targets bf16 forward vocab 49152")
    assert done.returncode == 0, done.stderr
    # Per thread and block eight columns: two loads of logits and two of the teacher's in each pass.
    assert done.stdout.count("ld.global.v4.b32") >= 8
    assert done.stdout.count("st.global.v4.b32") >= 1


def test_a_problem_makes_the_exit_status_1(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    results = [
        compile_check.Result("a", 90, 128, 0, 99 * 1024),
        compile_check.Result("b", 86, 128, 0, 99 * 1024 + 1),
    ]
    assert [r.problem == "" for r in results] == [True, False]
    monkeypatch.setattr(compile_check, "check", lambda *_: iter(results))
    assert compile_check.main(["--arch", "90"]) == 1
    monkeypatch.setattr(compile_check, "check", lambda *_: iter(results[:1]))
    assert compile_check.main(["--arch", "90"]) == 0
    assert "1 compiled, 0 with a problem" in capsys.readouterr().out


def test_the_part_for_ci_covers_every_kernel_on_every_architecture():
    cases = compile_check.shipped_cases()
    for arch in compile_check.SHARED_MEMORY:
        here = [case for case in cases if arch in case.archs]
        core = [case for case in here if case.core]
        assert {case.kernel for case in core} == {case.kernel for case in here}
        names = " ".join(case.name for case in core)
        for kind in ("forward", "backward", "prepare"):
            for shape in ("bf16 D64 plain", "bf16 D64 two", "bf16 D128 plain", "bf16 D128 two"):
                assert f"attention {kind} {shape}" in names, (arch, kind, shape)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_every_kind_of_group_is_compiled(kind):
    """Groups of 3 divide, others shift or do neither: a tile may spill for some of them alone."""
    for arch in compile_check.SHARED_MEMORY:
        for head_dim, core in itertools.product((64, 128), (False, True)):
            groups = {
                case.constants["GROUP"]
                for case in compile_check.shipped_cases()
                if case.name.startswith(f"attention {kind} bf16 D{head_dim} ")
                and arch in case.archs
                and case.core >= core
            }
            assert groups >= ({1, 3} if core else {1, 3, 4, 8}), (arch, head_dim, core)


def test_one_binary_is_compiled_once(monkeypatch):
    case = next(c for c in compile_check.shipped_cases() if 90 in c.archs)
    same = dataclasses.replace(case, name="under another name")
    other = dataclasses.replace(case, name="with other warps", num_warps=case.num_warps * 2)
    done = []
    monkeypatch.setattr(compile_check, "compile_case", lambda case, arch: done.append(case.name))
    list(compile_check.check([case, same, other], [90], jobs=1))
    assert done == [case.name, "with other warps"]


def test_every_architecture_has_a_configuration_of_every_pass():
    names = {arch: set() for arch in compile_check.SHARED_MEMORY}
    for case in compile_check.shipped_cases():
        for arch in case.archs:
            names[arch].add(" ".join(case.name.split()[:3]))
    expected = {
        f"attention {kind} {dtype}"
        for kind in ("forward", "prepare", "backward")
        for dtype in ("bf16", "fp32")
    }
    for arch, found in names.items():
        assert expected <= found, arch


def test_unknown_selection_and_the_interpreter_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no case has 'nonsense' in its name"):
        compile_check.main(["--only", "nonsense"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it for compile_check"):
        compile_check.main([])


@pytest.mark.parametrize(("capability", "kib"), [(8.0, 163), (8.9, 99), (9.0, 227), (10.0, 227)])
def test_a_device_takes_the_tiles_compiled_for_it(monkeypatch, capability, kib):
    major, minor = map(int, str(capability).split("."))
    properties = SimpleNamespace(major=major, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = configs.device_class.__wrapped__(torch.device("cuda"))
    assert 10 * major + minor in configs.DEVICE_CLASSES[found]


@pytest.mark.parametrize("version", [(3, 6), (3, 7), (3, 8), (3, 9), (4, 0)])
def test_every_triton_version_finds_every_tile(monkeypatch, version):
    monkeypatch.setattr(configs, "triton_version", lambda: version)
    places = list(itertools.product((0, *configs.DEVICE_CLASSES), configs.DIM_BUCKETS, (2, 4)))
    forward = configs.forward_table.__wrapped__()
    assert forward.keys() == {(*place, dense) for place in places for dense in (False, True)}
    assert configs.backward_table.__wrapped__().keys() == set(places)
