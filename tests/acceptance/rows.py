"""The acceptance rows: what was promised, by id. A test says `@pytest.mark.row("T17")` for the rows that it shows.

T rows are about Tolaria, K rows about Leyline, Oona, Weatherlight, Nissa and Kasmina. `later` says what a row waits
for; a row without it must have a test that ran and passed.
"""

from dataclasses import dataclass

SEEDS = "seeds: the next part of the model's growth"
NERVES = "the messages between the parts as a whole: bus, emergency path, contracts"


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    promise: str
    later: str = ""


ROWS: tuple[Row, ...] = (
    Row("T01", "The end of an epoch costs at most 18 ms, measured in four parts; the part that is late is named"),
    Row("T02", "Late boundaries open a breaker and lead to conservative mode, in which what is not essential rests"),
    Row("T03", "Breakers close, open and probe; a dead Tamiyo is asked once per window and is found again when back"),
    Row("T04", "The state packet holds what was measured and nothing else"),
    Row("T05", "Tamiyo is waited for 12 ms, given up after 2 s, and leaves no thread behind"),
    Row("T06", "Every command type has its effect or is refused with a reason, once per id, within its deadline"),
    Row("T07", "A command without a valid signature, nonce or freshness is never acted on"),
    Row("T08", "Gradients of several seeds are aggregated by their stage", SEEDS),
    Row("T09", "Seeds own their parameters; conflicts between them can be projected away", SEEDS),
    Row("T10", "Telemetry per seed", SEEDS),
    Row("T11", "A gradient that is not finite reaches no weight; clipping works"),
    Row("T12", "One authority for learning rates, with schedules and warm-up; foreign changes are found and undone"),
    Row("T13", "Three foreign changes open the breaker and lead to conservative mode"),
    Row("T14", "Parameter groups are registered by name; a new one starts small and warms up"),
    Row("T15", "The optimizer is rebuilt at boundaries only, not too often, and keeps its state or stays as it was"),
    Row("T16", "After a rebuild the learning rate acts on the optimizer that lives"),
    Row("T17", "A checkpoint is whole or not there, whenever the writer is killed; damage is found"),
    Row("T18", "After a rollback training goes on bit for bit as if it had always been there"),
    Row("T19", "Rollback from memory within 500 ms, below a cap of bytes, never to a poisoned state"),
    Row("T20", "Rollback from the volume within 12 s, or the model stays as it was and the run says so"),
    Row("T21", "A rollback takes its participants in order and is all or nothing", SEEDS),
    Row("T22", "A missed deadline reaches Weatherlight and the emergency stream at once"),
    Row("T23", "Snapshots come at their cadence"),
    Row("T24", "Four emergency levels with their ways up and down"),
    Row("T25", "Emergencies are broadcast within 100 ms by every leg"),
    Row("T26", "The run halts itself after failed boundaries in a row or a rollback past its deadline, and is heard"),
    Row("T27", "Structured telemetry with priorities while the run trains"),
    Row("T28", "Leyline alone holds contracts"),
    Row("T29", "Priorities are set once and forwarded"),
    Row("T30", "Typed contracts instead of maps, for seeds and field reports too"),
    Row("T31", "Metric names are those of the catalogue"),
    Row("T32", "Stages and gates of seeds in the contracts"),
    Row("T33", "Messages keep their budgets of time and size"),
    Row("T34", "Versions of messages are checked strictly"),
    Row("T35", "A missing identity is an error, never a placeholder"),
    Row("T36", "What was given up leaves neither thread nor file open"),
    Row(
        "T37", "torch.compile, mixed precision and TF32 are guarded: what fails is said, training goes on where it was"
    ),
    Row("T38", "The blending factor advances without a new trace", SEEDS),
    Row("T39", "The profiler writes traces; when it cannot, training makes the same steps"),
    Row("T40", "Batches are fetched ahead; on a GPU the time of their copy is measured"),
    Row("T41", "CUDA graphs fall back where they cannot run; on a GPU they learn like eager steps"),
    Row("T42", "Metrics of seeds cost no allocation per step", SEEDS),
    Row("T43", "Every mode and timeout has its event and metric"),
    Row("T44", "Figures come from one command that measures"),
    Row("T45", "A hundred epochs with seeds", SEEDS),
    Row("T46", "Every documented switch of rollback works"),
    Row("T47", "Protection costs at most 7.5 % of time; of memory whole copies of the state: bench_memory counts them"),
    Row("T48", "A loss explosion is seen, and what follows is what the table says"),
    Row("T49", "Handing telemetry over takes less than 2 ms per batch"),
    Row("T50", "Summaries per layer of seeds", SEEDS),
    Row("T51", "A run on a cluster goes on after its pod was deleted in the middle of an epoch"),
    Row("K07", "A missed deadline of rollback reaches Weatherlight's telemetry and the emergency stream, once"),
    Row("K08", "An emergency reaches every process of its run within 100 ms and is counted once"),
    Row("K09", "A halt stops within one step, for each level its action"),
    Row(
        "K10",
        "Breakers of the fabric open, probe and close by the clock, and each change is told with its priority",
    ),
    Row("K11", "The priority a producer set is the one that is routed by, on every stream"),
    Row("K12", "Priority is a field of envelope and packet; what has none is refused"),
    Row("K13", "CRITICAL is delivered within 100 ms while all else is at its limit"),
    Row("K14", "Events have the level and health that the catalogue says"),
    Row("K15", "No enumeration mirrors one of Leyline"),
    Row("K16", "No map where a field belongs"),
    Row("K17", "Structured fields have the numbers of the design"),
    Row("K27", "A command that is refused is told CRITICAL with its reason"),
    Row("K28", "Accepted and refused commands are counted by reason, their verification timed"),
    Row("K29", "The ledger of nonces is bounded, counted, and never lets a fresh nonce be used again"),
    Row("K38", "Telemetry on the emergency stream is counted once and loses nothing"),
    Row("K39", "Back-pressure drops what it says and no more; queue depth stays below its bound"),
    Row("K41", "Weatherlight starts and stops cleanly within 10 s"),
    Row("K42", "The system mode is degraded while a worker is down, and recovers"),
    Row("K43", "Under load no packet is routed by another priority than its own"),
    Row("K44", "Metric names are those of the catalogue, for good"),
    Row("K45", "Dashboards use metrics that exist"),
    Row("K46", "Every alert rule fires, stays silent and clears where it should"),
    Row("K47", "Every panel of the dashboards has data from a real run"),
    Row("K59", "Telemetry is on the bus while a run trains, none twice, none lost at its end"),
    Row("K61", "One code path: no broad except, no swallowed error"),
    Row("K62", "Each leg of an emergency alone delivers it; ids make it act once"),
    Row("K63", "Kasmina and Tamiyo are sidecars of the pod"),
    Row("K65", "HIGH and CRITICAL telemetry is counted by source"),
)
BY_ID: dict[str, Row] = {row.id: row for row in ROWS}
