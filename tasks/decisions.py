"""Whether each planned stage would run, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from repae_core.artifacts import Artifact, Manifest
from repae_core.config import section_name
from tasks.plan import Plan, PlannedStage
from tasks.stage_inputs import without_init


@dataclass(frozen=True)
class Decision:
    """What would happen to a stage: `skip`, `resume` or `run`, and why."""

    action: str
    reason: str


def decide(planned: PlannedStage, *, forced: bool = False) -> Decision:
    """Skip a whole artifact made from these inputs; resume what was stopped; else run, and say what changed."""
    manifest = planned.artifact.manifest()
    if forced:
        return Decision("run", "forced")
    if manifest is not None and planned.artifact.is_whole():
        stale = stale_input(planned, manifest.inputs)
        return Decision("run", stale) if stale else Decision("skip", "finished")
    if manifest is not None:
        return Decision("run", "files are missing")
    if planned.artifact.exists("work.json"):
        return Decision("resume", "an earlier attempt was stopped")
    return Decision("run", _what_changed(planned))


def decide_all(plan: Plan, forced: set[str]) -> dict[str, Decision]:
    """What a run of the pipeline would do, in order: a stage whose input will be made again is run again."""
    decisions: dict[str, Decision] = {}
    for name, planned in plan.stages.items():
        if name in plan.not_needed:
            continue
        decision = decide(planned, forced=name in forced)
        remade = next((a.stage for a in planned.inputs.values() if _will_change(decisions, plan, a)), None)
        if decision.action == "skip" and remade:
            decision = Decision("run", f"its input {remade} will be made again")
        decisions[name] = decision
    return decisions


def _will_change(decisions: Mapping[str, Decision], plan: Plan, artifact: Artifact) -> bool:
    made_here = plan.stages.get(artifact.stage)
    return made_here is not None and made_here.artifact is artifact and decisions[artifact.stage].action != "skip"


def stale_input(planned: PlannedStage, recorded: Mapping[str, Any]) -> str:
    """Why inputs differ from the recorded ones (role -> fingerprint and manifest hash); empty if they do not."""
    for role, artifact in planned.inputs.items():
        entry, current = recorded.get(role), artifact.manifest_sha256()
        if entry is not None and current is not None and entry.manifest_sha256 != current:
            return f"its input {artifact.stage}/{artifact.fingerprint} was made again"
    return ""


def _what_changed(planned: PlannedStage) -> str:
    manifests = _manifests(planned)
    if not manifests:
        return "never made in this store"
    newest = max(manifests, key=lambda m: m.finished_at)
    before, now = _flatten(newest.config), _flatten(planned.payload)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    shown = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed[:3]]
    reason = "; ".join(shown) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
    shorter = _longest_of_fewer_steps(planned, manifests)
    if shorter is not None:
        field = f"{section_name(planned.name)}.init_from={shorter.fingerprint}"
        reason += f" (add --set {field} to continue its {shorter.config['config']['max_steps']} steps)"
    return reason


def _manifests(planned: PlannedStage) -> list[Manifest]:
    """Of every finished artifact of the same stage that a config made (an import is of none)."""
    store, stage = planned.artifact.store, planned.name
    found = (Artifact(store, stage, name).manifest() for name in store.folders(stage))
    return [manifest for manifest in found if manifest is not None and "config" in manifest.config]


def _longest_of_fewer_steps(planned: PlannedStage, manifests: Iterable[Manifest]) -> Manifest | None:
    """The finished run that is as planned but for a smaller `max_steps`; it may continue such another."""
    if "init" in planned.inputs:
        return None
    by_name = {m.fingerprint: m for m in manifests}

    def of_any_length(payload: Mapping[str, Any]) -> dict[str, Any]:
        return {**without_init(payload), "config": {k: v for k, v in payload["config"].items() if k != "max_steps"}}

    def steps(payload: Mapping[str, Any]) -> int:
        return int(payload["config"].get("max_steps", 0))

    def shorter(manifest: Manifest | None) -> bool:
        if manifest is None or of_any_length(manifest.config) != same or steps(manifest.config) >= longest:
            return False
        return "init" not in manifest.inputs or shorter(by_name.get(manifest.inputs["init"].fingerprint))

    same, longest = of_any_length(planned.payload), steps(planned.payload)
    return max(filter(shorter, by_name.values()), key=lambda m: steps(m.config), default=None)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for name, nested in value.items():
            flat |= _flatten(nested, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix.removeprefix("config."): value}
