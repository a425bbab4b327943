"""Each fault that the operator handles, from what the cluster shows to condition, reason, field and remedy."""

import json
from collections.abc import Callable

import pytest
from esper_operator.model import Claim, Secret
from esper_operator.testing.builders import Scene, a_run

from tests.support import hostile, specs
from tests.support.scenes import condition, phases, running


def message(scene: Scene, kind: str) -> str:
    return str(next(c["message"] for c in scene.status["conditions"] if c["type"] == kind))


def pending(scene: Scene | None = None, unschedulable: str = "", **options: object) -> Scene:
    """A run whose Job exists and whose pod waits for a place."""
    return (scene or a_run()).reconciled().with_pods(state="pending", unschedulable=unschedulable, **options)


def warnings(scene: Scene) -> list[str]:
    return [str(event.reason) for event in scene.change().events if event.warning]


def is_steady(scene: Scene) -> bool:
    """A day of looking at it changes nothing: no attempt, no deletion, no write."""
    for _ in range(24):
        scene = scene.later(3600)
        plan = scene.plan()
        if plan.job or plan.deletions or plan.outcome or scene.change().changed:
            return False
    return True


# --- images ---


@pytest.mark.parametrize(
    ("container", "image"),
    [("tolaria", "registry.invalid/mine:1"), ("weatherlight", "esper/sidecar:test")],
)
def test_an_image_that_cannot_be_pulled_is_named_with_its_container(container: str, image: str) -> None:
    scene = a_run(runtime={"entrypoint": "a.b:build", "image": "registry.invalid/mine:1"}).reconciled()
    scene = scene.with_pods(state="placed", waiting=(container, "ErrImagePull"))
    assert warnings(scene) == ["ImagePullFailed"]
    scene = scene.reconciled()
    assert condition(scene, "PodsReady") == ("False", "ImagePullFailed")
    assert scene.status["reason"] == "ImagePullFailed"
    said = message(scene, "PodsReady")
    assert f"image {image} of container {container}" in said
    assert "imagePullSecrets" in said
    alternating = scene.having(pods=()).with_pods(state="placed", waiting=(container, "ImagePullBackOff"))
    assert alternating.change().changed is False


def test_an_image_that_comes_after_all_is_no_story() -> None:
    scene = a_run().reconciled().with_pods(state="placed", waiting=("tolaria", "ImagePullBackOff")).reconciled()
    scene = scene.having(pods=()).with_pods().reporting("RUNNING", step=1, moved=("STARTING", "RUNNING")).reconciled()
    assert (scene.status["phase"], scene.status["restarts"]["total"]) == ("Running", 0)


def test_an_image_that_never_comes_ends_with_the_startup_deadline() -> None:
    scene = a_run(startupDeadlineSeconds=60, restart={"maxRestarts": 0}).reconciled()
    scene = scene.with_pods(state="placed", waiting=("tolaria", "ImagePullBackOff")).reconciled().later(61).reconciled()
    assert (scene.status["phase"], scene.status["lastFailure"]["reason"]) == ("Failed", "StartupDeadlineExceeded")
    assert "spec.startupDeadlineSeconds = 60" in message(scene, "Failed")


# --- claims ---

UNBOUND = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims"
CLAIM = Claim(name="digits-checkpoints", phase="Pending", storage_class="slow")


def test_a_claim_that_stays_pending_is_named_with_its_storage_class() -> None:
    scene = pending(unschedulable=UNBOUND).having(claim=CLAIM)
    assert warnings(scene) == []
    assert scene.plan().requeue_after_s == 15
    scene = scene.reconciled()
    assert condition(scene, "PodsReady") == ("False", "PodsPending")
    scene = scene.later(15)
    assert warnings(scene) == ["ClaimPending"]
    scene = scene.reconciled()
    assert condition(scene, "PodsReady") == ("False", "ClaimPending")
    assert scene.status["reason"] == "ClaimPending"
    said = message(scene, "PodsReady")
    assert "claim digits-checkpoints of 1Gi is Pending" in said
    assert "StorageClass slow" in said
    assert is_steady(scene)
    bound = scene.having(claim=None, pods=()).with_pods().reporting("RUNNING", step=1, moved=("STARTING", "RUNNING"))
    assert bound.reconciled().status["phase"] == "Running"


def test_a_claim_that_nobody_complains_of_has_longer() -> None:
    scene = pending().having(claim=CLAIM)
    assert scene.plan().requeue_after_s == 60
    assert condition(scene.later(59).reconciled(), "PodsReady") == ("False", "PodsPending")
    assert condition(scene.later(60).reconciled(), "PodsReady") == ("False", "ClaimPending")


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (Claim(name="mine", phase=""), "claim mine of spec.checkpoint.storage does not exist: create it"),
        (Claim(name="mine", phase="Lost"), "claim mine of spec.checkpoint.storage is Lost: restore its volume"),
        (Claim(name="mine", phase="Pending"), "no StorageClass and the cluster has no default"),
    ],
)
def test_each_trouble_of_a_claim_has_its_own_remedy(claim: Claim, words: str) -> None:
    scene = pending(a_run(checkpoint={"storage": {"claimName": "mine"}}), UNBOUND).having(claim=claim).later(60)
    assert words in message(scene.reconciled(), "PodsReady")


def test_a_claim_that_only_waits_for_a_node_is_not_blamed() -> None:
    scene = pending(unschedulable="0/1 nodes are available: 1 Insufficient nvidia.com/gpu.").having(claim=CLAIM)
    assert condition(scene.later(600).reconciled(), "PodsReady") == ("False", "Unschedulable")


# --- no GPU ---


def test_a_gpu_that_is_nowhere_is_waited_for_without_churn() -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    nowhere = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    scene = pending(a_run(workers=gpus, startupDeadlineSeconds=60, activeDeadlineSeconds=60), nowhere)
    assert warnings(scene) == ["Unschedulable"]
    scene = scene.reconciled()
    assert condition(scene, "PodsReady") == ("False", "Unschedulable")
    assert (scene.status["phase"], scene.status["reason"]) == ("Pending", "Unschedulable")
    said = message(scene, "PodsReady")
    assert "Insufficient nvidia.com/gpu" in said
    assert "spec.workers.resources" in said
    assert is_steady(scene)
    added = scene.later(86_400).having(pods=()).with_pods(state="placed").reconciled()
    assert (added.status["phase"], added.status["attempt"]) == ("Starting", 1)
    trained = added.having(pods=()).with_pods().reporting("RUNNING", step=1, moved=("STARTING", "RUNNING")).reconciled()
    assert (trained.status["phase"], trained.status["restarts"]["total"]) == ("Running", 0)


# --- specs that ask for too much, with the CRD bypassed ---


@pytest.mark.parametrize("case", hostile.SPECS, ids=lambda case: case.name)
def test_a_hostile_spec_makes_nothing_and_says_which_field(case: hostile.HostileSpec) -> None:
    scene = a_run().having(name="run", spec=specs.with_patch(case.patch))
    plan = scene.plan()
    assert (plan.job, plan.children, plan.signal, plan.deletions) == (None, (), None, ())
    assert len(scene.change().events) == 1
    scene = scene.reconciled()
    assert condition(scene, "Accepted")[0] == "False"
    assert condition(scene, "Accepted")[1] in ("InvalidSpec", "Unsupported")
    assert (scene.status["phase"], scene.jobs) == ("Pending", ())
    said = message(scene, "Accepted")
    assert said.startswith("spec.")
    assert len(said) <= 4096
    assert is_steady(scene)


def test_more_than_one_worker_is_refused_for_now() -> None:
    scene = a_run(workers={"count": 4}).reconciled()
    assert condition(scene, "Accepted") == ("False", "Unsupported")
    assert "spec.workers.count: this version does not do that yet; one worker pod per run" in message(scene, "Accepted")
    assert a_run(workers={"count": 4}).plan().job is None
    mended = scene.edited(workers={"count": 1}).reconciled()
    assert (condition(mended, "Accepted"), mended.status["attempt"]) == (("True", "Accepted"), 1)


# --- edits while it runs ---

CONFIG = {"entrypoint": "esper_runtime.workloads.digits:build", "config": {"epochs": 3}}


def test_an_allowed_edit_takes_effect_in_the_running_pods() -> None:
    scene = running()
    digest = config_hash(scene)
    scene = scene.having(pods=()).with_pods(config_hash=digest).edited(health={"progressTimeoutSeconds": 99})
    plan = scene.plan()
    assert plan.touch_pods not in (None, digest)
    written = next(c.manifest for c in plan.children if c.manifest["metadata"]["name"] == "digits-config")
    assert json.loads(written["data"]["run.json"])["health"]["progressTimeoutSeconds"] == 99
    assert condition(scene.reconciled(), "Accepted") == ("True", "Accepted")


def config_hash(scene: Scene) -> str:
    config = next(c for c in scene.plan().children if c.manifest["metadata"]["name"] == "digits-config")
    return str(config.manifest["metadata"]["annotations"]["esper.dev/config-hash"])


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        ({"runtime": {**CONFIG, "config": {"epoch": 3}}}, "spec.runtime"),
        ({"runtime": {**CONFIG, "config": {"epochs": 4}}}, "spec.runtime"),
        ({"runtime": {**CONFIG, "config": {"epochs": 3, "extra": None}}}, "spec.runtime"),
        ({"runtime": {**CONFIG, "image": "mine:2"}}, "spec.runtime"),
        ({"workers": {"sharedMemorySize": "2Gi"}}, "spec.workers"),
        ({"checkpoint": {"storage": {"claimName": "another"}}}, "spec.checkpoint.storage"),
    ],
    ids=["config key renamed", "config value", "config null", "image", "workers", "storage"],
)
def test_a_refused_edit_is_said_and_harms_nothing(edit: dict[str, object], field: str) -> None:
    """Also past the CRD: the hashes in status.launched remember what the attempt was started with."""
    scene = running(runtime=CONFIG)
    before = dict(scene.status["launched"])
    scene = scene.edited(**edit)
    plan = scene.plan()
    assert (plan.children, plan.job, plan.deletions, plan.touch_pods) == ((), None, (), None)
    assert warnings(scene) == ["ForbiddenEdit"]
    scene = scene.reconciled()
    assert condition(scene, "Accepted") == ("False", "ForbiddenEdit")
    assert message(scene, "Accepted").startswith(f"{field}: ")
    assert "put it back" in message(scene, "Accepted")
    assert (scene.status["phase"], scene.status["attempt"]) == ("Running", 1)
    assert scene.status["launched"] == before
    back = scene.edited(runtime=CONFIG, workers=None, checkpoint=a_run().spec["checkpoint"]).reconciled()
    assert condition(back, "Accepted") == ("True", "Accepted")


# --- two runs on one claim ---


@pytest.mark.parametrize(
    ("storage", "where"),
    [
        ({"claimName": "shared"}, "claim shared is in use"),
        ({"claimName": "shared", "subPath": "a"}, "claim shared, subPath a is in use"),
        ({"claimTemplate": {"size": "1Gi"}}, "claim digits-checkpoints is in use"),
    ],
)
def test_the_second_run_on_a_claim_waits_and_takes_over_when_it_is_free(storage: dict[str, object], where: str) -> None:
    scene = a_run(checkpoint={"storage": storage}).having(claim_user="team/first")
    assert (scene.plan().job, scene.plan().children) == (None, ())
    assert scene.plan().requeue_after_s == 30
    assert warnings(scene) == ["CheckpointClaimInUse"]
    scene = scene.reconciled()
    assert condition(scene, "Accepted") == ("False", "CheckpointClaimInUse")
    said = message(scene, "Accepted")
    assert where in said
    assert "team/first" in said
    assert "another claimName or subPath" in said
    assert is_steady(scene)
    assert scene.having(claim_user="").reconciled().status["attempt"] == 1


def test_a_run_that_trains_is_not_thrown_off_its_claim() -> None:
    scene = running().having(claim_user="team/other")
    assert (scene.plan().deletions, condition(scene.reconciled(), "Accepted")) == ((), ("True", "Accepted"))


# --- Secrets ---


def mounting(name: str, **spec: object) -> Scene:
    volume = {"name": "s", "mountPath": "/data", "secretName": name}
    return a_run(workers={"pod": {"volumes": [volume]}}, **spec)


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (Secret(name="other-keys", found=True, owner="run other"), "other-keys holds credentials of run other"),
        (Secret(name="other-bus", found=True, owner="run other"), "other-bus holds credentials of run other"),
        (Secret(name="renamed", found=True, owner="the operator"), "renamed holds credentials of the operator"),
        (Secret(name="later-keys", found=False), "later-keys does not exist"),
        (Secret(name="later-bus", found=False), "create the Secret first, or give it another name"),
    ],
    ids=lambda value: value.name if isinstance(value, Secret) else "",
)
def test_the_credentials_of_another_run_are_not_mounted(secret: Secret, words: str) -> None:
    by_volume = mounting(secret.name).having(secrets=(secret,))
    key = {"name": secret.name, "key": "report.key"}
    env = {"entrypoint": "a.b:build", "env": [{"name": "A", "secretKeyRef": key}]}
    by_variable = a_run(runtime=env).having(secrets=(secret,))
    for scene, field in (
        (by_volume, "spec.workers.pod.volumes[0].secretName"),
        (by_variable, "spec.runtime.env[0].secretKeyRef.name"),
    ):
        assert (scene.plan().job, scene.plan().requeue_after_s) == (None, 30)
        refused = scene.reconciled()
        assert condition(refused, "Accepted") == ("False", "InvalidSpec")
        assert message(refused, "Accepted").startswith(f"{field}: ")
        assert words in message(refused, "Accepted")


@pytest.mark.parametrize("secret", [Secret(name="my-keys", found=True), Secret(name="token", found=False)])
def test_a_secret_of_the_users_own_is(secret: Secret) -> None:
    assert mounting(secret.name).having(secrets=(secret,)).plan().job is not None


# --- what a normal life does not say ---


def test_a_normal_life_says_nothing_alarming() -> None:
    scene = a_run()
    said: list[str] = []
    life: tuple[Callable[[Scene], Scene], ...] = (
        lambda s: s,
        lambda s: s.with_pods(state="pending"),
        lambda s: s.having(claim=CLAIM),
        lambda s: s.having(pods=()).with_pods(state="pending", unschedulable=UNBOUND),
        lambda s: s.having(claim=None, pods=()).with_pods(state="placed"),
        lambda s: s.having(pods=()).with_pods(),
        lambda s: s.reporting("RUNNING", step=1, moved=("STARTING", "RUNNING"), reason="Training"),
        lambda s: s.reporting("RUNNING", step=900, checkpoint=900),
        lambda s: s.failed(0),
    )
    for step in life:
        scene = step(scene.later(1))
        said += [str(e.reason) for e in scene.change().events]
        assert warnings(scene) == []
        scene = scene.reconciled()
    assert said == ["JobCreated", "Training", "Complete"]
    assert phases(scene) == ["Pending", "Starting", "Running", "Succeeded"]
