"""An export is taken only when its digest is right; what was there before stays otherwise."""

import io
import json
import tarfile

import pytest
import xxhash
from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.export import copy_verified, opened_first
from esper_runtime.cli.fetch import reader_pod, unpack


@pytest.fixture
def export(tmp_path):
    source = tmp_path / "export"
    source.mkdir()
    content = b"weights" * 1000
    (source / "model.safetensors").write_bytes(content)
    description = {
        "file": "model.safetensors",
        "size": len(content),
        "xxh3_128": xxhash.xxh3_128(content).hexdigest(),
        "step": 9,
    }
    (source / "model.json").write_text(json.dumps(description))
    return source


def test_a_sound_export_is_copied(export, tmp_path):
    copied = copy_verified(export, tmp_path / "out")
    assert [path.name for path in copied] == ["model.json", "model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip(d / "model.safetensors"), "digest .* is not .*: the file is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x"), "has 1 bytes, model.json says 7000"),
        (lambda d: (d / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda d: (d / "model.json").unlink(), "no exported model yet"),
        (lambda d: (d / "model.json").write_text("{"), "model.json is no JSON"),
        (lambda d: (d / "model.json").write_text('{"file": "../x", "size": 1, "xxh3_128": ""}'), "does not say which"),
    ],
)
def test_a_damaged_export_is_refused_and_the_old_one_kept(export, tmp_path, damage, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    damage(export)
    with pytest.raises(BackendError, match=message):
        copy_verified(export, out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("model.safetensors", "old")]


@pytest.fixture
def parts(tmp_path):
    """An export in two parts."""
    source = tmp_path / "parts"
    source.mkdir()
    contents = {
        "model-00001-of-00002.safetensors": b"weights" * 100,
        "model-00002-of-00002.safetensors": b"biases" * 100,
        "model.safetensors.index.json": b"{}",
    }
    described = {}
    for name, content in contents.items():
        (source / name).write_bytes(content)
        described[name] = {"size": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    index = described.pop("model.safetensors.index.json")
    description = {"file": "model.safetensors.index.json", **index, "files": described}
    (source / "model.json").write_text(json.dumps(description))
    return source


def test_an_export_in_parts_takes_the_place_of_one_in_one_file_and_back(export, parts, tmp_path):
    out = tmp_path / "out"
    for source in (export, parts, export):
        copied = copy_verified(source, out)
        names = sorted(p.name for p in source.iterdir())
        assert [path.name for path in copied] == names
        assert sorted(p.name for p in out.iterdir()) == names
        assert opened_first(out).read_bytes() == opened_first(source).read_bytes()
    assert (opened_first(parts).name, opened_first(export).name) == (
        "model.safetensors.index.json", "model.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip(d / "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors: digest .* is not"),
        (lambda d: (d / "model-00001-of-00002.safetensors").unlink(), "lacks model-00001-of-00002.safetensors"),
        (lambda d: (d / "model.safetensors.index.json").write_bytes(b"[]"), "index.json: digest .* is not"),
        (lambda d: (d / "model-00003-of-00003.safetensors").touch(), "model-00003-of-.* is no part of the export"),
        (lambda d: (d / "model.safetensors").touch(), "model.safetensors is no part of the export"),
        (lambda d: change(d, lambda said: said["files"].popitem()), "model-00002-of-.* is no part of the export"),
        (lambda d: change(d, lambda said: said["files"].update(x=1)), "does not say which"),
        (
            lambda d: change(d, lambda said: said["files"].update({"../x": {"size": 1, "xxh3_128": ""}})),
            "does not say which",
        ),
        (lambda d: change(d, lambda said: said.update(file=[])), "does not say which"),
    ],
)
def test_an_export_in_parts_is_taken_whole_or_not_at_all(parts, tmp_path, damage, message):
    damage(parts)
    with pytest.raises(BackendError, match=message):
        copy_verified(parts, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def change(directory, how):
    description = json.loads((directory / "model.json").read_text())
    how(description)
    (directory / "model.json").write_text(json.dumps(description))


def archive(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|") as tar:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, 1 if kind == tarfile.REGTYPE else 0, "/etc/passwd"
            tar.addfile(member, io.BytesIO(b"x"))
    out.seek(0)
    return out


def test_a_stream_of_plain_files_is_unpacked(tmp_path):
    unpack(archive(("model.json", tarfile.REGTYPE)), tmp_path)
    assert (tmp_path / "model.json").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../model.json", tarfile.REGTYPE),
        ("/etc/x", tarfile.REGTYPE),
        ("model.json", tarfile.SYMTYPE),
        ("model.json", tarfile.LNKTYPE),
        ("d", tarfile.DIRTYPE),
        (".hidden", tarfile.REGTYPE),
    ],
)
def test_anything_else_in_a_stream_is_refused(tmp_path, name, kind):
    with pytest.raises(BackendError, match="no part of a model"):
        unpack(archive((name, kind)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_reader_pod_is_restricted_and_reads_only():
    resource = {
        "metadata": {"name": "digits"},
        "spec": {"checkpoint": {"storage": {"claimName": "mine", "subPath": "a/b"}}},
    }
    spec = reader_pod(resource, "image")["spec"]
    [container] = spec["containers"]
    assert container["volumeMounts"] == [
        {"name": "checkpoints", "mountPath": "/checkpoints", "readOnly": True, "subPath": "a/b"}
    ]
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert spec["activeDeadlineSeconds"] > 0
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
