"""Commands on shards behind a URL: verify, stats, and what `--help` does not import."""

import shutil
import subprocess
import sys

import pytest
from helpers_data import make_processor, make_samples
from servers import FileServer
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.common.errors import exit_code
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.data.remote.reader import Retry
from ldistill.data.store import Reading
from ldistill.tools.shards.verify import verify_shards


@pytest.fixture
def root(tmp_path):
    options = BuildOptions(shard_bytes=30_000)
    samples = {"docvqa": make_samples("docvqa", 20), "vsr": make_samples("vsr", 12)}
    build_shards(samples, tmp_path / "shards", make_processor(), options=options)
    return tmp_path / "shards"


def invoke(*arguments):
    return CliRunner().invoke(app, ["shards", *map(str, arguments)])


def test_verify_and_stats_of_a_url(root, tmp_path):
    with FileServer(root) as server:
        options = ("--cache", tmp_path / "cache", "--cache-gb", "1")
        result = invoke("verify", server.url, "--workers", "1", *options)
        assert result.exit_code == 0, result.output
        assert "2 sources, 5 shards, 32 samples: 0 problems" in result.output
        result = invoke("stats", server.url, "--max-length", "128", *options)
        assert result.exit_code == 0, result.output
        assert "32 of 32 samples" in result.output
        assert server.tar_bytes() == sum(s.bytes for s in ShardIndex.load(root).shards)
        result = invoke("stats", server.url + "/nowhere", *options)
        assert exit_code(result.exception) == 2
        assert "no shards at" in str(result.exception)


def test_verify_looks_at_the_store_and_not_at_the_cache(root, tmp_path):
    reading = Reading(str(tmp_path / "cache"), reads="whole", retry=Retry(2, 0.01))
    with FileServer(root) as server:
        index = ShardIndex.load(server.url, reading=reading)
        for shard in index.shards:
            index.read(shard.start)
        assert not any(verify_shards(ShardIndex.load(server.url, reading=reading)))
        first, second, third, fourth, _ = index.shards
        damaged = root / "docvqa" / first.path.rpartition("/")[2]
        damaged.write_bytes(bytes([1]) + damaged.read_bytes()[1:])
        short = root / "docvqa" / second.path.rpartition("/")[2]
        short.write_bytes(short.read_bytes()[:600])
        (root / "docvqa" / third.path.rpartition("/")[2]).unlink()
        shutil.copy(root / "vsr" / fourth.path.rpartition("/")[2], root / "vsr/stray.tar")
        found = verify_shards(ShardIndex.load(server.url, reading=reading))
        problems = "\n".join(problem for part in found for problem in part)
        assert f"{first.path} has another SHA-256 than in the index" in problems
        assert f"in {first.path}: corrupt sample" in problems
        assert f"{second.path} has 600 bytes instead of {second.bytes}" in problems
        assert f"{third.path} is missing" in problems
        assert f"{server.url}/vsr/stray.tar is not in the index" in problems
        assert fourth.path not in problems


def test_help_imports_no_network_library():
    code = (
        "import sys, ldistill.cli\n"
        "print(sorted({'fsspec', 's3fs', 'aiohttp', 'botocore', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_local_shards_import_no_network_library(root):
    code = (
        "import sys\n"
        "from ldistill.data.index import ShardIndex\n"
        f"index = ShardIndex.load({str(root)!r}); index.check_files(); index.read(3)\n"
        "print(sorted({'fsspec', 's3fs', 'aiohttp', 'botocore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
