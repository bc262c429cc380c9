"""Shards in a data set of a hub: the real client, against a server with the hub's API."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers_data import make_processor, make_samples
from servers import HubServer

from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex

REPO = "team/shards"
# huggingface_hub takes its address and whether it is offline from the environment, at import
READ = """
import hashlib, json, sys
from ldistill.data.index import ShardIndex
from ldistill.data.remote.reader import Retry
from ldistill.data.store import Reading

url, reads, cache, pattern = sys.argv[1:5]
reading = Reading(cache, reads=reads, retry=Retry(attempts=3, first=0.01))
index = ShardIndex.load(url, reading=reading)
index.check_files()
data = [index.store.read(*index.locate(int(i))[:2]) for i in pattern.split(",")]
hashes = [hashlib.sha256(sample).hexdigest() for sample in data]
print(json.dumps([index.sources, len(index), hashes]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    samples = {"docvqa": make_samples("docvqa", 40), "vsr": make_samples("vsr", 20)}
    build_shards(samples, root, make_processor(), options=BuildOptions(shard_bytes=30_000))
    return root


def client(server, *command, token="", **settings):
    """Run a program whose hub is `server`."""
    hub = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "" if token else "1",  # not that of whoever tests
    }
    environment = {**os.environ, **hub, **settings}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def api_requests(server):
    """Requests that are not for files."""
    return sum(count for name, count in server.requests.items() if " /api/" in name)


@pytest.mark.parametrize("reads", ["whole", "ranged"])
def test_a_data_set_of_the_hub_gives_the_local_samples_and_no_byte_more(built, tmp_path, reads):
    local = ShardIndex.load(built)
    pattern = np.random.default_rng(0).permutation(len(local)).tolist()
    with HubServer(built, REPO, token="hf_secret") as server:
        arguments = (f"hf://datasets/{REPO}", reads, str(tmp_path), ",".join(map(str, pattern)))
        done = client(server, "-c", READ, *arguments, token="hf_secret")
        assert done.returncode == 0, done.stderr[-2000:]
        sources, count, hashes = json.loads(done.stdout.splitlines()[-1])
        assert (sources, count) == (local.sources, len(local))
        samples = [local.store.read(*local.locate(i)[:2]) for i in pattern]
        assert hashes == [hashlib.sha256(sample).hexdigest() for sample in samples]
        expected = local.column("size").astype(np.int64)[pattern].sum()
        if reads == "whole":
            expected = sum({(s := local.locate(i)[0]).path: s.bytes for i in pattern}.values())
        assert server.tar_bytes() == expected
        asked = api_requests(server)
        server.requests.clear()
        few = (*arguments[:3], str(pattern[0]))
        assert client(server, "-c", READ, *few, token="hf_secret").returncode == 0
        # Of the API's answers a client keeps some by thread, so their number is not exact; but they
        # are for shards, not for samples.
        assert 0 < asked < api_requests(server) + len(pattern)


def test_what_the_hub_refuses_or_lacks_is_a_sentence(built, tmp_path):
    with HubServer(built, REPO, token="hf_secret") as server:
        verify = ("-m", "ldistill.cli", "shards", "verify")
        cache = ("--cache", str(tmp_path))
        refused = client(server, *verify, f"hf://datasets/{REPO}", *cache)
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr
        assert "credentials" in refused.stderr
        missing = client(server, *verify, "hf://datasets/team/other", *cache, token="hf_secret")
        assert missing.returncode != 0
        assert "no shards at hf://datasets/team/other" in missing.stderr
        offline = client(server, *verify, f"hf://datasets/{REPO}", *cache, HF_HUB_OFFLINE="1")
        assert offline.returncode != 0
        assert "HF_HUB_OFFLINE is set" in offline.stderr
