"""`ldistill doctor`: what it says of this machine, and of machines that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldistill.tools import doctor, doctor_gpu
from ldistill.tools.doctor import OK, PROBLEM, WARNING


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found() -> dict[str, doctor.Line]:
    return {line.what: line for line in doctor.findings()}


def without_tools(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


def test_every_line_is_whole_and_this_machine_can_train(capsys):
    lines = list(doctor.findings())
    assert all(line.state == OK or line.advice for line in lines)
    assert all("\n" not in line.advice for line in lines)
    state = {line.what: line.state for line in lines}
    assert state["torch"] == state["deepspeed"] == state["C++ compiler"] == OK
    assert doctor.run() == 0
    assert "ready to train" in capsys.readouterr().out


def test_no_compiler_and_no_ninja_are_problems_with_advice(monkeypatch, tmp_path, capsys):
    without_tools(monkeypatch, tmp_path)
    lines = found()
    expected = WARNING if Path("/dev/nvidia0").exists() else PROBLEM
    assert lines["C++ compiler"].state == lines["ninja"].state == expected
    assert "g++" in lines["C++ compiler"].advice
    assert doctor.run() == (expected == PROBLEM)
    out = capsys.readouterr().out
    assert "→ install one" in out
    assert "Traceback" not in out


def test_an_empty_cxx_is_no_compiler_name(monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert found()["C++ compiler"].state == OK


def test_missing_and_old_packages_are_named(monkeypatch, tmp_path):
    info = tmp_path / "ldistill-0.dist-info"
    info.mkdir()
    needs = ["no-such-package>=1", "torch>=99", "numpy>=1", 'lmms-eval>=99; extra == "eval"']
    header = "Metadata-Version: 2.1\nName: ldistill\nVersion: 0\n"
    header += "Requires-Python: >=4\n"
    text = header + "".join(f"Requires-Dist: {need}\n" for need in needs)
    (info / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {line.what: line for line in doctor.packages()}
    assert lines["no-such-package"].state == PROBLEM
    assert lines["torch"].state == PROBLEM
    assert ">=99" in lines["torch"].advice
    assert lines["numpy"].state == OK
    [line] = doctor.python()
    assert (line.state, line.what) == (PROBLEM, "python")
    assert "Python >=4" in line.advice


def installed(folder: Path, **versions: str) -> None:
    """Metadata of packages that are there in these versions."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_half_an_extra_is_found_before_it_fails_in_the_middle(monkeypatch, tmp_path):
    """SmolVLM's evaluation without num2words."""
    installed(tmp_path, ldistill="0", here="2")
    extras = {"eval": ["here>=1", "gone>=3"], "lora": ["gone", "lost"], "s3": ["here"]}
    with (tmp_path / "ldistill-0.dist-info" / "METADATA").open("a") as file:
        for extra, names in extras.items():
            file.writelines(f'Requires-Dist: {n}; extra == "{extra}"\n' for n in names)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {line.what: line for line in doctor.packages()}
    assert lines["extra eval"].state == WARNING
    assert lines["extra eval"].advice == "pip install --upgrade 'gone>=3'"
    assert (lines["extra lora"].state, lines["extra s3"].state) == (OK, OK)
    assert "not installed" in lines["extra lora"].found
    assert lines["extra s3"].found == "here 2"


def test_what_will_be_compiled_and_that_bf16_is_slow_is_said_beforehand(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor_gpu, "has_fast_bf16", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor_gpu, "unusable_gpu", lambda: None)
    op = "cpu_adam"
    assert "will be compiled" in next(x.found for x in doctor_gpu.ops() if op in x.found)
    (tmp_path / op).mkdir(exist_ok=True)
    (tmp_path / op / f"{op}.so").touch()
    assert "compiled already" in next(x.found for x in doctor_gpu.ops() if op in x.found)
    lines = {line.what: line for line in doctor_gpu.gpus()}
    assert "recipes train in fp32" in lines["bf16"].found
    monkeypatch.setattr(doctor_gpu, "unusable_gpu", lambda: "driver too old")
    line = next(doctor_gpu.gpus())
    assert (line.state, line.what) == (PROBLEM, "GPU")
    assert "driver too old" in line.found


@pytest.mark.parametrize("error_of", [doctor_gpu.attention_error, doctor_gpu.loss_error])
def test_both_kernels_are_tried_and_named(monkeypatch, error_of):
    assert error_of("cpu", "reference") == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    called = []
    for name in ("attention_error", "loss_error"):
        monkeypatch.setattr(doctor_gpu, name, lambda *args, name=name: called.append(name) or 0.0)
    assert [line.state for line in doctor_gpu.kernels()] == [OK, OK]
    assert called == ["attention_error", "loss_error"]

    def fails(*args):
        raise RuntimeError("no ptxas\nmore")

    monkeypatch.setattr(doctor_gpu, error_of.__name__, lambda *args: 0.5)
    assert sorted(line.state for line in doctor_gpu.kernels()) == [OK, PROBLEM]
    monkeypatch.setattr(doctor_gpu, error_of.__name__, fails)
    [line] = [line for line in doctor_gpu.kernels() if line.state == PROBLEM]
    assert "RuntimeError: no ptxas" in line.found
    assert line.what == f"{error_of.__name__.removesuffix('_error')} kernel"


def test_a_hub_that_does_not_answer_is_only_a_warning(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = next(doctor.hub())
    assert line.state == WARNING
    assert "HF_HUB_OFFLINE=1" in line.advice


def test_a_check_that_breaks_is_a_warning_not_a_traceback(monkeypatch, tmp_path, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()  # a working directory that was removed under the process
    assert found()["disks"].state == WARNING
    assert doctor.run() == 0
    assert "could not be checked (FileNotFoundError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "name"), [("LDISTILL_CACHE", "disk, cache"), ("HF_HOME", "disk, hub")]
)
def test_disk_lines_look_where_the_caches_really_go(monkeypatch, tmp_path, variable, name):
    folder = tmp_path / "not" / "made" / "yet"
    monkeypatch.setenv(variable, str(folder))
    assert str(folder) in found()[name].found
    assert not folder.exists()
