"""The shared types: they survive the trip to another process."""

import pickle

import pytest
from helpers_data import make_samples

from ldistill.common.samples import BadImage, Drop
from ldistill.data.archive import BadSample


@pytest.mark.parametrize(
    "value", [make_samples("docvqa", 1)[0], Drop("missing image", "7"), Drop("x", "7", "turn")]
)
def test_values_equal_their_pickled_selves(value):
    assert pickle.loads(pickle.dumps(value)) == value


def test_errors_keep_reason_and_place_across_processes():
    image = pickle.loads(pickle.dumps(BadImage("undecodable image", "cut")))
    assert (image.reason, str(image)) == ("undecodable image", "undecodable image: cut")
    sample = pickle.loads(pickle.dumps(BadSample("corrupt sample", "a.tar", "vsr-01", "why")))
    assert (sample.reason, sample.shard, sample.key) == ("corrupt sample", "a.tar", "vsr-01")
    assert all(part in str(sample) for part in ("corrupt sample", "a.tar", "vsr-01", "why"))
