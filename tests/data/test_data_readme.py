"""The README of data/: its Python and its commands run, its tables name what is there."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mmicl_kernels import data
from mmicl_kernels.cli import main
from mmicl_kernels.data import Demonstration, Record, Records
from mmicl_kernels.data.formats import FORMATS
from tests.support.official import FILES, ROWS, write_images, write_official

README = Path(data.__file__).with_name("README.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    mmicl (data .*)$", README, re.MULTILINE)
EXAMPLE = re.search(r"^    (\{.*?\})\n\n", README, re.MULTILINE | re.DOTALL)[1].replace("\n", " ")


def test_its_record_and_its_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("val2014/COCO_val2014_000000262148.jpg", "photos/a.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4), "red").save(name)
    Path("train.jsonl").write_text(EXAMPLE)
    good = '{"image": "a.jpg", "text": "", "answer": "a photo"}'
    Path("web.jsonl").write_text(good + '\n{"image": "b.jpg", "text": "", "answer": "none"}\n{')
    names: dict = {}
    exec(compile(BLOCK, "README", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "1 262148000 Where is he looking? down ('down', 'down', 'at table')",
        "1 used, skipped: {'missing image': 1, 'bad JSON': 1}",
    ]
    image = Path("val2014/COCO_val2014_000000262148.jpg").read_bytes()
    assert names["shown"] == Demonstration((image,), "Where is he looking?", "down")
    assert list(names["rows"]) == [Record("0", (image,), "what?", "red")]
    assert len([line for line in BLOCK.splitlines() if line]) <= 10


def renamed(value, split):
    """The files of "train" as those of another split."""
    if isinstance(value, dict):
        return {key.replace("train", split): renamed(x, split) for key, x in value.items()}
    if isinstance(value, list):
        return [renamed(x, split) for x in value]
    return value.replace("train", split) if isinstance(value, str) else value


def test_there_is_a_command_of_each_format():
    assert [command.split()[1] for command in COMMANDS] == list(FORMATS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, format, source, *options = shlex.split(command)
    split, out = options[options.index("--split") + 1], options[options.index("--out") + 1]
    files, rows = renamed([FILES[format], ROWS[format]], split)
    if format == "hateful-memes":
        files = {f"dev_{part}.jsonl": files["dev.jsonl"] for part in ("seen", "unseen")}
    write_official(tmp_path / source, files)
    images = options[options.index("--images") + 1] if "--images" in options else source
    write_images(tmp_path / images, rows)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == f"{len(rows)} records in {out}, 0 skipped\n"
    found = list(Records(out))
    assert [record.id for record in found] == [row["id"] for row in rows]
    assert [record.answer for record in found] == [row["answer"] for row in rows]
    assert [record.image_bytes()[0].decode() for record in found] == [row["image"] for row in rows]


@pytest.mark.parametrize("name, format", FORMATS.items())
def test_the_table_of_formats(name, format):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", README, re.MULTILINE)
    _, _, splits, files, *_ = row.split("|")
    assert set(re.findall(r"[\w-]+", splits)) - {"both", "what", "they", "share", "once"} == set(
        format.splits
    )
    for file in format.splits["train"]:
        assert f"`{file}`" in files
