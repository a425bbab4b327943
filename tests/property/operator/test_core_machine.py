"""The pure core against a cluster that misbehaves: whatever happens, in whatever order, the run ends as it should."""

import itertools

import hypothesis.strategies as st
from esper_operator.api.v1alpha1 import Status
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.cluster_model import Cluster, OperatorKilled, SimOperator, SimPod, later, live_attempts

TERMINAL = ("Succeeded", "Failed")


class CoreMachine(RuleBasedStateMachine):
    people = True
    """Whether anybody halts or suspends the run, and whether reports get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.cluster.spec["restart"] = {"maxRestarts": 1000, "initialBackoffSeconds": 1, "maxBackoffSeconds": 4}
        self.operator = SimOperator(self.cluster)
        self.highest_attempt = 0
        self.observed = (0, 0)
        self.ended: str | None = None
        self.no_restart_helps = False
        self.deaths = 0
        """Pods that failed with a code that a restart may cure."""
        self.left_alone = True
        """No person intervened and no report was lost: then every figure must be exact."""

    # --- the operator ---

    @rule()
    def watches_catch_up(self) -> None:
        self.operator.hear()

    @rule()
    def operator_looks_at_what_it_has(self) -> None:
        self.operator.reconcile()

    @rule()
    def operator_looks_at_fresh_caches(self) -> None:
        self.operator.hear()
        self.operator.reconcile()

    @rule(point=st.sampled_from(["signal", "deletions", "job"]))
    def operator_is_killed_in_between(self, point: str) -> None:
        self.operator.hear()
        try:
            self.operator.reconcile(killed_after=point)
        except OperatorKilled:
            self.operator = SimOperator(self.cluster)
            self.cluster.cursor = None

    # --- the cluster ---

    @rule(rounds=st.integers(1, 6))
    def all_is_well(self, rounds: int) -> None:
        for _ in range(rounds):
            self.operator.hear()
            self.operator.reconcile()
            self.cluster.controllers()
            self.cluster.kubelet()
            self.cluster.train(1)
            later(self.cluster, 1)

    @rule(seconds=st.sampled_from([0.1, 1, 6, 30]))
    def time_passes(self, seconds: float) -> None:
        later(self.cluster, seconds)

    @rule()
    def controllers_work(self) -> None:
        self.cluster.controllers()

    @rule()
    def kubelet_works(self) -> None:
        self.cluster.kubelet()

    @rule(steps=st.integers(1, 8))
    def trainer_works(self, steps: int) -> None:
        self.cluster.train(steps)

    def _trainer(self) -> SimPod | None:
        return next((p for p in self.cluster.pods if p.trains and p.phase == "RUNNING"), None)

    @precondition(lambda self: self._trainer() is not None)
    @rule(code=st.sampled_from([1, 70, 72, 76, 134, 137, 139, 143, 255]))
    def pod_dies(self, code: int) -> None:
        self.cluster.end(self._trainer(), code)
        self.deaths += code != 143

    @precondition(lambda self: self._trainer() is not None)
    @rule()
    def node_is_drained(self) -> None:
        pod = self._trainer()
        pod.disrupted = True
        self.cluster.end(pod, 143)

    @precondition(lambda self: self._trainer() is not None)
    @rule()
    def pod_is_deleted(self) -> None:
        self._trainer().deleting = True

    @precondition(lambda self: self._trainer() is not None)
    @rule(code=st.sampled_from([71, 73, 74, 78]))
    def user_code_fails(self, code: int) -> None:
        pod = self._trainer()
        self.cluster.end(pod, code)
        self.no_restart_helps = True
        self.left_alone = self.left_alone and not pod.deleting  # its last word may vanish with the pod, unread

    @precondition(lambda self: self._trainer() is not None)
    @rule()
    def loss_turns_nan(self) -> None:
        self.cluster.rollback(self._trainer())

    @precondition(lambda self: self._trainer() is not None)
    @rule()
    def trainer_is_killed(self) -> None:
        self.cluster.kill_trainer(self._trainer())

    @precondition(lambda self: self.people)
    @rule(count=st.integers(1, 3))
    def reports_get_lost(self, count: int) -> None:
        self.cluster.lost_reports = count
        self.left_alone = False

    @rule()
    def reports_come_twice(self) -> None:
        self.cluster.bus += self.cluster.bus[-5:]

    # --- people ---

    @precondition(lambda self: self.people)
    @rule(mode=st.sampled_from(["None", "Freeze", "Checkpoint", "Kill"]))
    def emergency_stop(self, mode: str) -> None:
        self.cluster.edit(emergencyStop=mode)
        self.left_alone = False

    @precondition(lambda self: self.people)
    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.cluster.edit(suspend=value)
        self.left_alone = False

    @rule(seconds=st.integers(1, 100))
    def harmless_edit(self, seconds: int) -> None:
        self.cluster.edit(emergency={"acknowledgeTimeoutSeconds": seconds})

    # --- what must hold at every moment ---

    @invariant()
    def never_two_attempts_alive(self) -> None:
        assert len(live_attempts(self.cluster)) <= 1

    @invariant()
    def attempts_only_rise(self) -> None:
        status = self.cluster.status
        assert status.get("attempt", 0) >= self.highest_attempt
        self.highest_attempt = status.get("attempt", 0)
        made = self.cluster.attempts_made
        assert made == sorted(made)

    @invariant()
    def observed_reports_only_rise(self) -> None:
        observed = self.cluster.status.get("observedReport") or {"attempt": 0, "seq": 0}
        at = (observed["attempt"], observed["seq"])
        assert at >= self.observed
        self.observed = at

    @invariant()
    def terminal_states_absorb(self) -> None:
        phase = self.cluster.status.get("phase")
        if self.ended is not None:
            assert phase == self.ended
        if phase in TERMINAL:
            self.ended = phase

    @invariant()
    def status_is_well_formed(self) -> None:
        status = self.cluster.status
        if not status:
            return
        assert Status.model_validate(status).to_dict() == status
        assert len(status["conditions"]) == 10
        history = status["history"]
        assert len(history) <= 20
        assert all(b.get("from") == a["to"] for a, b in itertools.pairwise(history))
        assert history[-1]["to"] == status["phase"]
        assert status["rollbacks"]["total"] <= self.cluster.rollbacks
        assert status["restarts"]["total"] >= status["restarts"]["inPlace"]

    # --- and in the end ---

    def teardown(self) -> None:
        """Everybody lets go; the run must come to its right end, and then nothing is written any more."""
        cluster = self.cluster
        cluster.lost_reports = 0
        cluster.edit(emergencyStop="None", suspend=False)
        for _ in range(200):
            self.operator.settle()
            self.never_two_attempts_alive()
            if cluster.status["phase"] in TERMINAL:
                break
            cluster.controllers()
            cluster.kubelet()
            cluster.train()
            later(cluster, 5)
        phase = cluster.status["phase"]
        assert phase == "Succeeded" or (phase == "Failed" and self.no_restart_helps), cluster.status
        self.operator.settle()
        writes = cluster.writes
        later(cluster, 3600)
        plan = self.operator.reconcile()
        assert cluster.writes == writes
        assert (plan.job, plan.signal, plan.deletions) == (None, None, ())
        self.totals_are_right()

    def totals_are_right(self) -> None:
        status, cluster = self.cluster.status, self.cluster
        if status["phase"] == "Failed":
            return
        assert status["rollbacks"]["total"] == cluster.rollbacks
        assert status["restarts"]["inPlace"] == cluster.in_place
        assert status["progress"]["percentage"] == 100
        replaced = sum(boots - 1 for boots in cluster.boots.values())
        if self.left_alone:
            assert status["restarts"]["total"] == cluster.in_place + replaced + self.deaths
            assert status["attempt"] == 1 + self.deaths
            assert "ReportsLost" not in cluster.events


class UnattendedMachine(CoreMachine):
    """Only the cluster misbehaves: then every total is exact, however often the operator dies."""

    people = False


TestCore = CoreMachine.TestCase
TestUnattended = UnattendedMachine.TestCase
for case in (TestCore, TestUnattended):
    case.settings = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
