"""Volumes as directories, shown all at once like the kubelet does, and paths translated to where they lie."""

import os
import stat
from pathlib import Path

import pytest
from esper_runtime.local.errors import LocalError
from esper_runtime.local.volumes import (
    Mount,
    Mounts,
    container_mounts,
    expand,
    mount_directories,
    object_files,
    project,
    select,
)


def visible(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith("..")}


def test_projection_follows_every_change(tmp_path):
    for files in ({"a": b"1", "b": b"2"}, {"a": b"3"}, {}, {"c": b"4"}):
        assert project(tmp_path, files, mode=0o644)
        assert visible(tmp_path) == files
        assert not project(tmp_path, files, mode=0o644)
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("..2") or p.is_dir()]) <= 2


def test_the_old_set_stays_readable_until_the_new_one_is_there(tmp_path):
    project(tmp_path, {"a": b"old", "b": b"old"}, mode=0o644)
    descriptor = os.open(tmp_path / "..data", os.O_RDONLY)
    project(tmp_path, {"a": b"new", "b": b"new"}, mode=0o644)
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"new"


def test_secrets_are_private(tmp_path):
    project(tmp_path, {"key": b"x"}, mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "..data").stat().st_mode) == 0o700


def test_objects_become_files():
    assert object_files({"kind": "ConfigMap", "data": {"a": "x"}, "binaryData": {"b": "AA=="}}) == {
        "a": b"x",
        "b": b"\0",
    }
    assert object_files({"kind": "Secret", "data": {"a": "eA=="}, "stringData": {"b": "y"}}) == {"a": b"x", "b": b"y"}


def test_items_select_and_rename():
    assert select({"a": b"1", "b": b"2"}, [{"key": "b", "path": "c"}]) == {"c": b"2"}
    with pytest.raises(KeyError, match="z"):
        select({}, [{"key": "z", "path": "z"}])


def test_paths_are_translated_by_the_longest_mount():
    mounts = Mounts((Mount("/data", Path("/home/u/d")), Mount("/data/val", Path("/home/u/v"))))
    assert mounts.translate("/data") == "/home/u/d"
    assert mounts.translate("/data/x/y") == "/home/u/d/x/y"
    assert mounts.translate("/data/val/y") == "/home/u/v/y"
    assert mounts.translate("/database") == "/database"
    assert mounts.translate("s3://data") == "s3://data"
    assert mounts.translate_all({"a": ["/data/x", 1], "b": {"c": "/data"}}) == {
        "a": ["/home/u/d/x", 1],
        "b": {"c": "/home/u/d"},
    }


def pod(*containers):
    volumes = sorted({m["name"] for c in containers for m in c["volumeMounts"]})
    return {"containers": list(containers), "volumes": [{"name": v, "emptyDir": {}} for v in volumes]}


def test_a_volume_lies_at_its_mount_path_when_it_has_it_for_itself(tmp_path):
    spec = pod(
        {"volumeMounts": [{"name": "run", "mountPath": "/t/run"}, {"name": "keys-a", "mountPath": "/t/keys"}]},
        {"volumeMounts": [{"name": "run", "mountPath": "/t/run"}, {"name": "keys-b", "mountPath": "/t/keys"}]},
        {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    )
    found = mount_directories(spec, ["/t/run", "/t/keys"], tmp_path)
    assert found == {
        "run": Path("/t/run"),
        "keys-a": tmp_path / "keys-a",
        "keys-b": tmp_path / "keys-b",
        "data": tmp_path / "data",
    }


def test_a_sub_path_stays_inside_its_volume(tmp_path):
    def at(sub_path):
        mount = {"name": "v", "mountPath": "/v", "subPath": sub_path}
        return container_mounts({"volumeMounts": [mount]}, {"v": tmp_path})

    assert at("a/b")[0].directory == tmp_path / "a/b"
    for bad in ("../x", "/x", "a/../../x"):
        with pytest.raises(LocalError, match="leads out"):
            at(bad)


def test_references_expand_like_kubernetes_does():
    assert expand("$(A)-$(B)-$$(A)-$A", {"A": "1"}) == "1-$(B)-$(A)-$A"
