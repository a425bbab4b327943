"""A manifest is one run with the objects it names; everything else is refused with a remedy."""

import base64

import pytest
from esper_runtime.local.errors import ManifestError
from esper_runtime.local.manifest import load, parse

RUN = """
apiVersion: esper.dev/v1alpha1
kind: EsperTrainingRun
metadata: {name: digits}
spec: {runtime: {entrypoint: "a.b:c"}}
"""


def test_a_run_gets_the_default_namespace():
    assert parse(RUN, where="m").run["metadata"] == {"name": "digits", "namespace": "default"}


def test_namespace_comes_from_the_option():
    assert parse(RUN, where="m", namespace="team").run["metadata"]["namespace"] == "team"


def test_config_maps_and_secrets_become_files():
    found = parse(
        RUN
        + "---\n"
        + "{apiVersion: v1, kind: ConfigMap, metadata: {name: code}, data: {a.py: 'x = 1'}, binaryData: {b: AAE=}}\n"
        + "---\n"
        + f"{{apiVersion: v1, kind: Secret, metadata: {{name: s}}, data: {{k: {base64.b64encode(b'v').decode()}}}, "
        + "stringData: {p: q}}\n",
        where="m",
    )
    assert found.config_maps["code"].files == {"a.py": b"x = 1", "b": b"\0\1"}
    assert found.secrets["s"].files == {"k": b"v", "p": b"q"}


def test_dates_stay_texts():
    found = parse(RUN.replace("{name: digits}", "{name: digits, annotations: {day: 2026-01-01}}"), where="m")
    assert found.run["metadata"]["annotations"]["day"] == "2026-01-01"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 documents of kind EsperTrainingRun; exactly one"),
        (RUN + "---" + RUN, "2 documents of kind"),
        ("[1]", "document 1: must be an object"),
        ("{kind: Pod}", "kind is 'Pod'.*remove this document"),
        (RUN.replace("esper.dev/v1alpha1", "esper.dev/v9"), "apiVersion is 'esper.dev/v9'; must be"),
        (RUN.replace("{name: digits}", "{}"), "metadata.name is missing: add it"),
        (RUN + "spec: {}\n", "key 'spec' stands twice"),
        (RUN + "specs: {}\n", "unknown field 'specs'"),
        (RUN.replace("digits}", "digits, namespace: other}"), "'other' but --namespace is 'team'"),
        ("a: [", "no valid YAML"),
        ("a: !!python/object:os.system {}", "no valid YAML"),
        (RUN + "---\n{kind: ConfigMap, metadata: {name: c}, data: {k: 1}}", "data.k must be a text: put it in quotes"),
        (RUN + "---\n{kind: ConfigMap, metadata: {name: c}, data: {../k: x}}", "is no file name"),
        (RUN + "---\n{kind: Secret, metadata: {name: c}, data: {k: '%'}}", "data.k is no base64"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(text, message):
    with pytest.raises(ManifestError, match=message):
        parse(text, where="m", namespace="team")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"gone.yaml: No such file"):
        load(str(tmp_path / "gone.yaml"))


def test_binary_content_is_refused(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="not UTF-8"):
        load(str(path))
