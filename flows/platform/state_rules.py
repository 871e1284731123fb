"""A rule of Prefect's server: states that follow from an earlier look at a run are refused once the run has gone on.

The attendant and a schedule that is paused look at runs first and set their states then. Meanwhile a worker may take a
run: a state that puts it back among those that wait would start it twice.
"""

from collections.abc import Mapping
from typing import Any

from prefect.server.orchestration.core_policy import CoreFlowPolicy
from prefect.server.orchestration.dependencies import ORCHESTRATION_DEPENDENCIES
from prefect.server.orchestration.policies import FlowRunOrchestrationPolicy
from prefect.server.orchestration.rules import (
    ALL_ORCHESTRATION_STATES,
    FlowRunOrchestrationRule,
    OrchestrationContext,
)
from prefect.server.schemas.states import StateType

from flows.handle import QUEUED, RESCUED, SKIPPED

FOLLOWS: Mapping[str, tuple[StateType, ...]] = {  # the name of a state, and the types of those that it may follow
    QUEUED: (StateType.SCHEDULED,),
    RESCUED: (StateType.CRASHED,),
    SKIPPED: (StateType.SCHEDULED, StateType.RUNNING),  # a run that has begun skips itself
}


class FollowsWhatWasSeen(FlowRunOrchestrationRule):
    """Refuse a state of FOLLOWS where the run has another state by now than the one that called for it."""

    FROM_STATES = ALL_ORCHESTRATION_STATES
    TO_STATES = {StateType.SCHEDULED, StateType.CANCELLED}  # noqa: RUF012 - as in Prefect's own rules

    async def before_transition(
        self, initial_state: Any, proposed_state: Any, context: OrchestrationContext[Any, Any]
    ) -> None:
        if initial_state is None or proposed_state is None or proposed_state.name not in FOLLOWS:
            return
        if initial_state.type not in FOLLOWS[proposed_state.name]:
            await self.reject_transition(
                state=None, reason=f"{proposed_state.name} cannot follow {initial_state.name}: the run has gone on"
            )


class PlatformPolicy(CoreFlowPolicy):
    """Prefect's rules for the states of runs, after the platform's own."""

    @staticmethod
    def priority() -> list[Any]:
        return [FollowsWhatWasSeen, *CoreFlowPolicy.priority()]


def use_platform_policy() -> None:
    """Have the server of this process apply the platform's rules."""

    async def policy() -> type[FlowRunOrchestrationPolicy]:
        return PlatformPolicy

    ORCHESTRATION_DEPENDENCIES["flow_policy_provider"] = policy
