"""Tars that others wrote: captions, conversations, pickles, damage."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from helpers_data import Evil, make_processor, picture
from PIL import Image

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.build.build_types import BuildOptions, InputError, InputOptions
from ldistill.data.build.builder import build
from ldistill.data.build.inputs import open_inputs
from ldistill.data.build.tars import CAPTION_PROMPT, PICKLED, TarReader
from ldistill.data.index import ShardIndex

DATA, OTHER = picture(), picture(seed=1)
OPTIONS = InputOptions(extra={"cc12m": "language", "crude": "document"})


def write_tar(path: Path, members: dict[str, bytes | dict | list | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(*tars: Path) -> list[Sample | Drop]:
    [entry] = open_inputs(str(tars[0].parent / "*.tar"), OPTIONS)
    rows = list(entry.rows(0))
    assert [row for row, _ in rows] == list(range(len(rows)))
    for start in range(len(rows) + 1):
        assert list(entry.rows(start)) == rows[start:]
    return [item for row, sample in rows for item in entry.convert(row, sample)]


def test_captions_as_img2dataset_leaves_them(tmp_path):
    """CC12M and DataComp: a picture, its caption, and what is known of it."""
    about = {"caption": "a red bike", "url": "https://x", "status": "success", "width": 40}
    first = {"000000000.jpg": DATA, "000000000.txt": "a red bike", "000000000.json": about}
    first |= {"000000001.webp": OTHER, "000000001.json": about | {"caption": "two dogs"}}
    second = {"000010000.txt": "nothing to see", "000010000.json": about, "readme": b"x"}
    second |= {"000010001.png": DATA, "000010001.txt": "a cat", "000010001.cls": "3"}
    tars = [
        write_tar(tmp_path / "cc12m" / f"0000{n}.tar", m) for n, m in enumerate((first, second))
    ]
    bike, dogs, lone, cat = read(*tars)
    assert bike == Sample("000000000", "cc12m", (Turn(CAPTION_PROMPT, "a red bike"),), (DATA,))
    assert (dogs.turns[0].assistant, dogs.images) == ("two dogs", (OTHER,))
    assert lone == Drop("missing image", "000010000")
    assert (cat.id, cat.turns[0].assistant) == ("000010001", "a cat")


def test_conversations_of_the_crude_layout(tmp_path):
    said = [{"from": "human", "value": "a <image> b"}, {"from": "gpt", "value": "yes"}]
    parts = [
        {"type": "text", "text": "compare "},
        {"type": "image", "image": "s.2.png"},
        {"type": "text", "text": " and "},
        {"type": "image", "image": "sub/s.1.png"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "same"}]
    members = {
        "a.jpg": DATA,
        "a.json": {"id": "own", "conversations": said, "image": "elsewhere/a.jpg"},
        "b.jpg": DATA,
        "b.json": said,
        "dir.v1/s.1.png": DATA,
        "dir.v1/s.2.png": OTHER,
        "dir.v1/s.json": {"messages": messages},
        "t.json": {"prompt": "2 + 2?", "response": 4},
    }
    own, listed, compared, text = read(write_tar(tmp_path / "crude" / "0.tar", members))
    assert own == Sample("own", "crude", (Turn("a  b", "yes", (2,)),), (DATA,))
    assert listed == Sample("b", "crude", own.turns, (DATA,))
    assert compared.id == "dir.v1/s"
    assert compared.images == (OTHER, DATA), "in the order in which they are named"
    assert compared.turns[0] == Turn("compare  and ", "same", (8, 13))
    assert text == Sample("t", "crude", (Turn("2 + 2?", "4"),))


def test_no_file_outside_of_the_tar_is_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(DATA)
    part = [{"type": "image", "image": str(secret)}, {"type": "text", "text": "what?"}]
    talk = [{"role": "user", "content": part}, {"role": "assistant", "content": "no"}]
    plain = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no"}]
    members = {
        "a.json": {"messages": talk},
        "b.json": {"conversations": plain, "image": str(secret), "images": [str(secret)]},
    }
    found = read(write_tar(tmp_path / "crude" / "0.tar", members))
    assert found == [Drop("missing image", "a"), Drop("missing image", "b")]


@pytest.mark.parametrize("kind", ["pkl", "pyd", "pth", "PT", "1.pickle"])
def test_a_pickle_is_never_read(tmp_path, kind):
    import pickle

    members = {"a.jpg": DATA, "a.txt": "x", f"a.{kind}": pickle.dumps(Evil())}
    members |= {"b.jpg": DATA, "b.txt": "y"}
    tar = write_tar(tmp_path / "cc12m" / "0.tar", members)
    [entry] = open_inputs(str(tar.parent), OPTIONS)
    [(_, (_, read_members)), _] = entry.rows(0)
    assert read_members[kind.lower()] == b""
    dropped, kept = read(tar)
    assert dropped == Drop(PICKLED, "a")
    assert kept.id == "b"


def test_what_is_no_sample_is_a_drop_with_a_reason():
    reader = TarReader("cc12m")
    for members, why in (
        ({"jpg": DATA, "json": b"{"}, "JSONDecodeError"),
        ({"jpg": DATA, "txt": b"\xff\xfe"}, "UnicodeDecodeError"),
        ({"jpg": DATA, "cls": b""}, "no caption and no conversation"),
        ({"jpg": DATA, "json": b"3"}, "AttributeError"),
        ({"jpg": DATA, "json": b"[3, 4]"}, "AttributeError"),
    ):
        [drop] = reader(0, ("k", members))
        assert (drop.reason, drop.id) == ("malformed record", "k")
        assert why in drop.detail
    *_, empty = reader(0, ("k", {"jpg": DATA, "txt": b" "}))
    assert (empty.reason, empty.unit) == ("empty answer", "sample")


def test_folders_are_sources_that_build_and_their_bytes_do_not_depend_on_workers(tmp_path):
    for source in ("cc12m", "crude"):
        for number in range(2):
            members: dict[str, bytes | str] = {}
            for n in range(9):
                members |= {
                    f"{number}{n}.png": picture(seed=n),
                    f"{number}{n}.txt": f"{source} {n}",
                }
            members["bad.jpg"], members["bad.txt"] = b"no picture", "x"
            write_tar(tmp_path / "in" / source / f"{number}.tar", members)
    found = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        inputs = open_inputs(str(tmp_path / "in"), OPTIONS)
        options = BuildOptions(shard_bytes=9000, workers=workers)
        reports = build(inputs, out, make_processor(), options)
        assert [(r.source, r.category, r.samples, r.drops) for r in reports] == [
            ("cc12m", "language", 18, {"undecodable image": 2}),
            ("crude", "document", 18, {"undecodable image": 2}),
        ]
        found.append([p.read_bytes() for p in sorted(out.rglob("*.tar"))])
    assert found[0] == found[1]
    stored = ShardIndex.load(tmp_path / "out1").read(3)
    assert stored.turns == (Turn(CAPTION_PROMPT, "cc12m 3"),)
    assert Image.open(io.BytesIO(stored.images[0])).size == (40, 30)


def test_a_cut_tar_is_named(tmp_path):
    tar = write_tar(tmp_path / "cc12m" / "7.tar", {"a.jpg": DATA, "a.txt": "x", "b.jpg": DATA * 9})
    tar.write_bytes(tar.read_bytes()[:6000])
    [entry] = open_inputs(str(tar), OPTIONS)
    with pytest.raises(InputError, match=r"7.tar cannot be read on after sample 1"):
        list(entry.rows(0))


def test_inputs_that_are_none(tmp_path):
    write_tar(tmp_path / "cc12m" / "0.tar", {"a.jpg": DATA})
    with pytest.raises(FileNotFoundError, match="no data set at"):
        open_inputs(str(tmp_path / "nothing" / "*.tar"), OPTIONS)
    with pytest.raises(ValueError, match="Declare your own with --extra_sources cc12m=language"):
        open_inputs(str(tmp_path / "cc12m"), InputOptions())
    with pytest.raises(ValueError, match="leave --format and --min-rating out"):
        open_inputs(str(tmp_path / "cc12m"), InputOptions(extra=OPTIONS.extra, format="llava"))
