"""The report of a conversion: every tensor of both folders, once, as table and JSON; and whether the models agree."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qwen3_next import small

from seqzoo.models.checkpoints import SINGLE, Folder
from seqzoo.models.convert import convert, folders, verify
from seqzoo.models.convert.cli import main


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "theirs"
    small().save_pretrained(folder)
    tensors = load_file(folder / SINGLE) | {"mtp.fc.weight": torch.ones(3, 2)}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def sides(report):
    """Of the JSON: what it says of every tensor of either folder."""
    return [
        {x["name"]: (tuple(x["shape"]), x["dtype"], x["bytes"]) for fate in report["fates"] for x in fate[side]}
        for side in ("sources", "targets")
    ]


def heads(folder, *files):
    """What the headers say."""
    opened = [Folder(folder), *(Folder(folder, files=[file]) for file in files)]
    return {name: (head.shape, head.dtype, head.bytes) for x in opened for name, head in x.heads.items()}


def test_every_tensor_of_both_sides(theirs, tmp_path, capsys):
    args = [str(theirs), str(tmp_path / "ours"), "--report", str(tmp_path / "report.json")]
    assert main([*args, "--dry-run"]) == 0
    planned = json.loads((tmp_path / "report.json").read_text())
    assert main(args) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert planned == report
    source, target = sides(report)
    assert source == heads(theirs) and target == heads(tmp_path / "ours", "seqzoo_extra.safetensors")
    for side, of, counted in (("source", source, "sources"), ("target", target, "targets")):
        assert (report[side]["tensors"], report[side]["bytes"]) == (len(of), sum(x[2] for x in of.values()))
        assert sum(n[counted] for n in report["counts"].values()) == len(of)
    assert {"copied", "split", "stacked", "permuted", "reshaped", "kept"} == set(report["counts"])
    assert report["counts"]["kept"] == dict(rows=1, sources=1, source_bytes=24, targets=1, target_bytes=24)
    assert report["carried"] == ["generation_config.json"]
    table = capsys.readouterr().out
    assert "1 kept (1 -> 1 tensors, 0.0 MB)" in table and "verification: not verified: not asked for" in table
    assert (report["source"]["architecture"], report["target"]["architecture"]) == ("qwen3_next", "seqzoo")


def test_fates_on_the_way_back(theirs, tmp_path):
    convert(theirs, tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "back").json()
    assert sides(report) == [heads(tmp_path / "ours", "seqzoo_extra.safetensors"), heads(theirs)]
    assert {"fused", "unstacked"} < set(report["counts"])


def test_verified(theirs, tmp_path):
    """There and back; what is not written cannot be."""
    there = convert(theirs, tmp_path / "ours", verify=True)
    back = convert(tmp_path / "ours", tmp_path / "back", verify=True)
    for report in (there, back):
        measured = report.json()["verification"]
        assert 0 < measured["logits_difference"] < measured["bound"] == 1e-4
        assert "verification: logits differ by at most" in str(report)
    dry = convert(theirs, tmp_path / "dry", verify=True, dry_run=True)
    assert dry.verification.said == "not verified: nothing was written"


def test_a_wrong_conversion_is_found(theirs, tmp_path, monkeypatch):
    """And does not get the target's name."""
    chunks = folders.Reader.chunks

    def wrong(self, name):
        for chunk in chunks(self, name):
            yield chunk * 1.01 if name == "stack.blocks.2.mixer.out_proj.weight" else chunk

    monkeypatch.setattr(folders.Reader, "chunks", wrong)
    with pytest.raises(ValueError, match=r"logits differ by at most .* expected at most 0.0001"):
        convert(theirs, tmp_path / "ours", verify=True)
    assert not list(tmp_path.iterdir())


def test_without_a_class_to_compare_with(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    report = convert(theirs, tmp_path / "ours", verify=True)
    assert report.json()["verification"] == {"said": "not verified: transformers has no class for 'qwen3_next'"}
    assert (tmp_path / "ours" / SINGLE).is_file()
