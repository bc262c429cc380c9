"""Fixtures that several test files use."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors are small: threads of two test processes, or two ranks, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ops that DeepSpeed compiles are built once for this checkout and this PyTorch. Builds wait for a
# lock in their folder: two checkouts that shared one would wait for each other.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / f"torch-{version('torch')}-ops"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(COMPILED))
# One ninja for all builds, this environment's, activated or not: another would build them anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
GPU = any(Path("/dev").glob("nvidia[0-9]*"))  # a container may be given any of them
os.environ.setdefault("DS_ACCELERATOR", "cuda" if GPU else "cpu")
INTERPRETED = (
    "test_shared_kv_attention_triton",
    "test_distill_loss_triton",
    "test_kernels_in_training",
)
if not GPU:
    # Before any test file is imported: a kernel is interpreted or not as it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    triton, numpy = Version(version("triton")), Version(version("numpy"))
    broken = triton < Version("3.7") and numpy >= Version("2.4")
    no_interpreter = pytest.mark.skip(reason="Triton 3.6's interpreter needs NumPy below 2.4")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
        elif broken and item.path.stem in INTERPRETED:
            item.add_marker(no_interpreter)


@pytest.fixture(scope="session")
def pair_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pair whose student and teacher differ: ``student/`` and ``teacher/``."""
    from pairs import write_pair

    root = tmp_path_factory.mktemp("pair")
    write_pair(root)
    return root


@pytest.fixture(scope="session")
def same_pair_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pair whose teacher has the student decoder's weights."""
    from pairs import write_pair

    root = tmp_path_factory.mktemp("same_pair")
    write_pair(root, same_weights=True)
    return root
