"""(Observation, Plan, Applied) -> the complete next status and the Events of the transition.

`next` is the entry. `draft` holds the work in progress, `fold` takes the runtime's reports in, `halt`, `table` and
`phase` derive what people see, `events` says what changed.
"""

from esper_operator.status.next import next_status

__all__ = ["next_status"]
