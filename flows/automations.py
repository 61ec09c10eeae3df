"""Prefect automations that `repae deploy` creates: a flow run whose process vanished is started again."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

# Three heartbeats, and longer than an artifact's lease, so that the new process may take it over.
LOST_AFTER_SECONDS = 90
_NAME = "repae: start runs again that lost their process"
_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = {
    f"prefect.flow-run.{state}"
    for state in ("Completed", "Failed", "Cancelling", "Cancelled", "Crashed", "AwaitingRetry")
}


def restart_lost_runs() -> None:
    """Create the automation, or bring the one that is there up to date.

    Without it a run whose worker machine died stays "Running" for ever. Started again it skips finished stages and
    continues the others from their checkpoints.
    """
    automation = Automation(
        name=_NAME,
        description=f"No heartbeat for {LOST_AFTER_SECONDS} s: scheduled anew; finished stages are skipped.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT} | _ENDS,
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification({"prefect.resource.id": ["prefect.tag.repae"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=LOST_AFTER_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message=f"no heartbeat for {LOST_AFTER_SECONDS} s: its process is gone; it continues where it was",
                force=True,
            )
        ],
    )
    try:
        present = cast(Automation, Automation.read(name=_NAME))
    except ValueError:
        automation.create()
        return
    automation.id = present.id
    # An update forgets which runs it is waiting for: a worker that deploys at its start would save nobody.
    if automation != present:
        automation.update()
